"""Speed of evaluation: feature extraction beside torch-fidelity, and precision and recall at full size.

  python scripts/benchmarks/features.py [--images=256] [--image_size=256] [--batch_size=32] [--rounds=3]
  python scripts/benchmarks/features.py --manifolds [--reference=10000] [--samples=50000] [--features=2048]

The first draws Inception's weights (speed does not depend on them), runs the same images through our
extractor and, where torch and torch-fidelity are installed, through torch-fidelity's, in turns in this
process, and prints images a second of each: target, at least equal on CPU. Ours makes the inception score's
probabilities and sFID's features too, theirs the pool and logits.

The second prints the seconds for precision and recall and this process's peak memory: target, under 3 minutes
on two cores and at most 8 GiB at 10,000 x 50,000 x 2,048.
"""

import argparse
import resource
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--images", type=int, default=256)
    flag("--image_size", type=int, default=256)
    flag("--batch_size", type=int, default=32)
    flag("--rounds", type=int, default=3, help="turns of each; the best counts, others share the machine")
    flag("--manifolds", action="store_true", help="time precision and recall instead")
    flag("--reference", type=int, default=10_000)
    flag("--samples", type=int, default=50_000)
    flag("--features", type=int, default=2048)
    args = parser.parse_args()
    measure_manifolds(args) if args.manifolds else measure_extraction(args)


def measure_manifolds(args) -> None:
    from sfd_jax.evaluation import precision_recall

    generator = np.random.default_rng(0)
    level = generator.gamma(1.0, 0.4, args.features).astype(np.float32)

    def draw(number):  # not negative and of Inception's size, so that float16 holds the distances
        rows = generator.standard_normal((number, args.features), dtype=np.float32)
        rows *= 0.35 * np.sqrt(level)
        rows += level
        return np.maximum(rows, 0, out=rows)

    reference, samples = draw(args.reference), draw(args.samples)
    start = time.perf_counter()
    precision, recall = precision_recall(reference, samples)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"precision and recall, {args.reference} x {args.samples} x {args.features}: {seconds:.0f} s, peak {peak:.1f} GiB")
    print(f"(precision {precision:.4f}, recall {recall:.4f})")


def measure_extraction(args) -> None:
    from sfd_jax.convert import FORMATS
    from sfd_jax.convert.table import key_shapes
    from sfd_jax.models import Network

    table = FORMATS["inception"].TABLE
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in key_shapes(table, Network("inception", {})).items():
        if len(shape) == 1:
            state[key] = np.ones(shape, np.float32) if key.endswith(("running_var", "bn.weight")) else np.zeros(shape, np.float32)
        else:
            state[key] = (1.4 * generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    images = generator.integers(0, 256, (args.images, args.image_size, args.image_size, 3), dtype=np.uint8)

    extractors = {"sfd_jax": our_extractor(table, state, args.batch_size)}
    if theirs := torch_fidelity_extractor(state, args.batch_size):
        extractors["torch-fidelity"] = theirs
    best, pools = {}, {}
    for name, extract in extractors.items():
        pools[name] = extract(images[: args.batch_size])  # compiles, warms up
    for _ in range(args.rounds):
        for name, extract in extractors.items():
            start = time.perf_counter()
            extract(images)
            best[name] = min(best.get(name, np.inf), time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name:<15} {args.images / seconds:7.1f} images/s")
    if len(pools) == 2:
        ours, other = pools.values()
        print(f"largest relative difference of their features: {np.abs(ours - other).max() / np.abs(other).max():.1e}")
        print(f"sfd_jax / torch-fidelity: {best['torch-fidelity'] / best['sfd_jax']:.2f}")


def our_extractor(table, state, batch_size):
    from sfd_jax.convert.table import import_params
    from sfd_jax.evaluation import extract_features, inception_extractor
    from sfd_jax.models import Network

    network = Network("inception", {})
    params = import_params(table, state, network)
    extractor = inception_extractor((params, {"network": "inception", "network_config": network.config_dict()}))

    def extract(images):
        rows = extract_features([extractor], [images], batch_size=batch_size)
        return np.concatenate([answer["features"] for [answer] in rows])

    return extract


def torch_fidelity_extractor(state, batch_size):
    """Return torch-fidelity's extraction, None where it is not installed."""
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        print(f"torch-fidelity is not measured: {error}")
        return None
    import tempfile

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
    network.eval()

    @torch.no_grad()
    def extract(images):
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        return np.concatenate([network(batch)[0].numpy() for batch in batches])

    return extract


if __name__ == "__main__":
    main()
