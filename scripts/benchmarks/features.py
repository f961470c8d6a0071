"""Speed of evaluation: feature extraction beside torch-fidelity, and precision and recall at full size.

  python scripts/benchmarks/features.py --versus=torch [--images=256] [--image_size=256] [--batch_size=32]
  python scripts/benchmarks/features.py --manifolds [--reference=10000] [--samples=50000] [--features=2048]

The first draws Inception's weights (speed does not depend on them), runs the same images through our extractor and
through torch-fidelity's (extra `torch`, and the package torch-fidelity), in turns in this process, after a comparison
of their features. The target is at least equal speed on a CPU. Ours also computes the Inception score's probabilities
and sFID's features, theirs the pool and logits. On a GPU theirs runs with TF32, which is PyTorch's default.

The second prints the seconds for precision and recall and this process's peak memory. The target is under 3 minutes
on two cores and at most 8 GiB at 10,000 x 50,000 x 2,048.
"""

import functools
import time

import numpy as np
from _common import finish, make_parser, need, peak_memory, share_memory, spread, table, take_turns

SAME = 1e-3  # relative difference of the features, float32 through 94 convolutions


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(rounds=3)
    flag = parser.add_argument
    flag("--images", type=int, default=256)
    flag("--image_size", type=int, default=256)
    flag("--batch_size", type=int, help="of both (default: as in `sfd evaluate`, 8 on a CPU and 32 elsewhere)")
    flag("--manifolds", action="store_true", help="time precision and recall instead")
    flag("--reference", type=int, default=10_000)
    flag("--samples", type=int, default=50_000)
    flag("--features", type=int, default=2048)
    args = parser.parse_args()
    if args.versus:
        need("torch", "torch-fidelity")
    share_memory()
    from sfd_jax.distributed import make_mesh
    from sfd_jax.evaluation import images_at_once

    args.batch_size = args.batch_size or images_at_once(make_mesh())
    measure_manifolds(args) if args.manifolds else measure_extraction(args)


def measure_manifolds(args) -> None:
    from sfd_jax.evaluation import precision_recall

    generator = np.random.default_rng(0)
    level = generator.gamma(1.0, 0.4, args.features).astype(np.float32)

    def draw(number):  # not negative and of the magnitude of Inception's, so that float16 holds the distances
        rows = generator.standard_normal((number, args.features), dtype=np.float32)
        rows *= 0.35 * np.sqrt(level)
        rows += level
        return np.maximum(rows, 0, out=rows)

    reference, samples = draw(args.reference), draw(args.samples)
    start = time.perf_counter()
    precision, recall = precision_recall(reference, samples)
    seconds = time.perf_counter() - start
    memory = peak_memory()
    size = f"{args.reference} x {args.samples} x {args.features}"
    rows = [[size, seconds, memory["process"], f"{precision:.4f}", f"{recall:.4f}"]]
    record = {"benchmark": "manifolds", "settings": vars(args), "seconds": seconds, "peak_gib": memory}
    head = ["precision and recall", "seconds", "peak GiB", "precision", "recall"]
    finish(record, [table(head, rows)], [], args.json)


def measure_extraction(args) -> None:
    from sfd_jax.convert import FORMATS
    from sfd_jax.convert.table import key_shapes
    from sfd_jax.models import Network

    table_ = FORMATS["inception"].TABLE
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in key_shapes(table_, Network("inception", {})).items():
        if len(shape) == 1:
            state[key] = (
                np.ones(shape, np.float32)
                if key.endswith(("running_var", "bn.weight"))
                else np.zeros(shape, np.float32)
            )
        else:
            state[key] = (1.4 * generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    images = generator.integers(0, 256, (args.images, args.image_size, args.image_size, 3), dtype=np.uint8)

    extractors = {"sfd_jax": our_extractor(table_, state, args.batch_size)}
    notes = []
    if args.versus:
        theirs = torch_fidelity_extractor(state, args.batch_size)
        ours, other = (extract(images[: args.batch_size]) for extract in (extractors["sfd_jax"], theirs))
        worst = float(np.abs(ours - other).max() / np.abs(other).max())
        if not worst < SAME:
            raise SystemExit(f"the features do not agree ({worst:.1e}; at most {SAME:g}): nothing is timed")
        notes.append(f"largest relative difference of the features before timing: {worst:.1e}")
        extractors["torch-fidelity"] = theirs
        import torch

        if torch.cuda.is_available():
            extractors["torch-fidelity, TF32"] = functools.partial(theirs, tf32=True)
    runs = {name: lambda extract=extract: extract(images) for name, extract in extractors.items()}
    times, first = take_turns(runs, args.rounds)
    rows = [[name, each["median"], spread(each), args.images / each["median"]] for name, each in times.items()]
    size = (
        f"Inception features of {args.images} images of {args.image_size} pixels, batches of {args.batch_size}, "
        f"{args.rounds} rounds in turns"
    )
    tables = [size, table(["what", "seconds", "spread", "images/s"], rows)]
    ratios = {name: times[name]["median"] / times["sfd_jax"]["median"] for name in times if name != "sfd_jax"}
    if ratios:
        tables.append(
            table(["speed of sfd_jax over", "ratio of medians"], [[n, f"{r:.2f}"] for n, r in ratios.items()])
        )
    record = {
        "benchmark": "features",
        "settings": vars(args),
        "seconds": times,
        "first_call": first,
        "ratios": ratios,
        "peak_gib": peak_memory(),
    }
    finish(record, tables, notes, args.json)


def our_extractor(table, state, batch_size):
    from sfd_jax.convert.table import import_params
    from sfd_jax.evaluation import extract_features, inception_extractor
    from sfd_jax.models import Network

    network = Network("inception", {})
    params = import_params(table, state, network)
    extractor = inception_extractor((params, {"network": "inception", "network_config": network.config_dict()}))

    def extract(images):
        rows = extract_features([extractor], [images], batch_size=batch_size)
        return np.concatenate([features["features"] for [features] in rows])

    return extract


def torch_fidelity_extractor(state, batch_size):
    """Return torch-fidelity's extraction."""
    import tempfile

    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = {key: torch.from_numpy(array) for key, array in state.items()}
    state |= {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for key in list(state)
        if key.endswith("running_var")
    }
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.eval().to(device)

    @torch.no_grad()
    def extract(images, tf32=False):
        # PyTorch rounds convolutions to TF32 on a GPU by default; ours are float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        return np.concatenate([network(batch.to(device))[0].cpu().numpy() for batch in batches])

    return extract


if __name__ == "__main__":
    main()
