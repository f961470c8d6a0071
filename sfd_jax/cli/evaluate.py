"""FID, sFID, IS, precision and recall of samples, as the ADM suite defines them.

  sfd evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=DIR --out=scores.json
  sfd evaluate --live --checkpoint=DIR --texture_vae=DIR --reference=... --inception=... --out=scores.json
  sfd evaluate --reference=photos/ --image_size=256 --inception=DIR --save_statistics=photos.npz
  sfd evaluate --reconstruction --texture_vae=DIR --reference=photos/ --image_size=256 --inception=DIR --lpips=DIR

--samples is an npz with arr_0, a folder of PNGs, or the folder of `sfd sample`; --live measures straight
from the sampler, with no image on disk. --reference is an ADM reference batch (whose mu, sigma, mu_s,
sigma_s are used when present), a folder of images, or a statistics file that --save_statistics wrote.
Statistics remember the extractor that made them, and are refused with another. --inception is the converted
pt_inception-2015-12-05; --dinov2 adds the Frechet distance in DINOv2 features.

The scores are printed and written to --out as JSON, together with what decides them: hashes of checkpoints,
statistics, extractor and reference, sampler, network calls, labels, dtype, seed and N. A file that is there
already is not overwritten. Lines that begin with "note:" say what was assumed.
"""

import json
from pathlib import Path

from sfd_jax.cli.flags import door_parser, local_path, parse_door, path
from sfd_jax.cli.sampling_flags import ONLY_SAMPLING, SAMPLING_RULES, add_sampling_flags
from sfd_jax.errors import Faults, SfdError, nearest
from sfd_jax.experiment.sampling import check_flags, load_checkpoint, open_sampler
from sfd_jax.files import write_new
from sfd_jax.ranges import Only

RULES = (
    *SAMPLING_RULES,
    Only(ONLY_SAMPLING, "live"),
    Only("texture_vae weights seed", "live reconstruction"),
    Only("num", "live samples"),
    Only("lpips", "reconstruction"),
    Only("dinov2 metrics", "samples live"),
    Only("metrics", "inception"),
    Only("save_statistics", "reconstruction", never=True),
)


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON."""
    args = _parse(argv)

    from sfd_jax import distributed
    from sfd_jax.distributed.preflight import Job

    checkpoints = (args.checkpoint, args.texture_vae, args.weak, args.inception, args.dinov2, args.lpips)
    distributed.start(Job({"flags": vars(args)}, needs=(args.samples, args.reference, *checkpoints)))
    if args.reconstruction:
        report = _reconstruction(args)
    elif args.samples or args.live:
        report = _evaluate(args)
    else:
        report = _statistics_alone(args)
    if distributed.is_host0():
        for name, value in report["scores"].items():
            print(f"{name:<10} {value:.6g}")
        for note in report.get("notes", []):
            print(f"note: {note}")
        if args.out:
            try:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                write_new(args.out, json.dumps(report, indent=2) + "\n")
            except OSError as error:
                raise SfdError(f"cannot write {args.out}: {error}") from error
            print(args.out)
    return 0


def _parse(argv: list[str]):
    """Read the flags and refuse, before any work, what could only fail after it."""
    parser = door_parser("evaluate", __doc__)
    flag = parser.add_argument
    flag("--samples", type=local_path, metavar="PATH", help="images to be judged")
    flag("--live", action="store_true", help="judge images straight from the sampler, whose flags are below")
    flag(
        "--reconstruction", action="store_true", help="judge --texture_vae by how it gives the reference's images back"
    )
    flag("--reference", type=local_path, required=True, metavar="PATH", help="what to compare with")
    flag(
        "--image_size",
        type=int,
        default=None,
        help="crop a reference folder's images to this size, as the ADM suite does (default: take them as they are)",
    )
    flag("--inception", type=path, metavar="DIR", help="checkpoint of the 2015 Inception, as `sfd convert` writes it")
    flag(
        "--dinov2",
        type=path,
        metavar="DIR",
        help="DINOv2 checkpoint: adds fd_dinov2, the Frechet distance in its class tokens; of another encoder than "
        "the published ViT-L/14 it is called fd_ and that encoder's name",
    )
    flag("--lpips", type=path, metavar="DIR", help="checkpoint of LPIPS; without it --reconstruction leaves lpips out")
    flag(
        "--metrics",
        default="fid,sfid,is,precision,recall",
        help="comma-separated, out of fid, sfid, is, precision, recall, kid (default: %(default)s)",
    )
    flag("--out", type=local_path, metavar="FILE", help="JSON file for scores and recipe")
    flag(
        "--save_statistics",
        type=local_path,
        metavar="FILE",
        help="write the reference's statistics and features, to be used as --reference later",
    )
    flag(
        "--eval_batch_size",
        type=int,
        help="images per device for features; changes nothing but speed (default: 8 on a CPU, 32 elsewhere)",
    )
    add_sampling_flags(parser, required=False)
    args = parse_door(parser, argv, rules=RULES)

    found = Faults()
    if sum(map(bool, (args.samples, args.live, args.reconstruction))) > 1:
        found.append("give one of --samples, --live and --reconstruction")
    if not (args.samples or args.live or args.reconstruction or args.save_statistics):
        found.append("nothing to judge: give --samples=PATH, --live, --reconstruction or --save_statistics=FILE")
    if not args.inception and (args.reconstruction or args.save_statistics or not args.dinov2):
        found.append("scores need features: give --inception=DIR (`sfd fetch inception` says where to get it)")
    if args.reconstruction and not args.texture_vae:
        found.append("--reconstruction needs --texture_vae=DIR")
    if args.image_size is not None and Path(args.reference).is_file():
        found.append(f"--image_size={args.image_size} has no effect: {args.reference} is no folder of images")
    args.metrics = tuple(dict.fromkeys(filter(None, map(str.strip, args.metrics.split(",")))))
    with found:
        if args.live:
            check_flags(args)
    with found:
        _check_metrics(args.metrics)
    for file in filter(None, (args.out, args.save_statistics)):
        if Path(file).exists():
            found.append(f"{file} exists already and is not overwritten; choose another name")
    found.stop()
    return args


def _check_metrics(metrics: tuple[str, ...]) -> None:
    """Raise SfdError for metrics that are none; whether the reference serves them `compare` checks before it begins."""
    from sfd_jax.evaluation.evaluate import METRICS

    if not metrics:
        raise SfdError(f"--metrics is empty: give some of {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise SfdError(f"--metrics: unknown metric '{metric}'; {nearest(metric, METRICS)}")


def _evaluate(args) -> dict:
    from sfd_jax.evaluation import Comparison, compare, open_reference

    reference = open_reference(args.reference, args.image_size)
    comparisons = []
    if args.inception:
        comparisons.append(Comparison(reference, _extractor("inception", args.inception), args.metrics))
    if args.dinov2:
        extractor = _extractor("dinov2", args.dinov2)
        comparisons.append(Comparison(reference.for_extractor(extractor), extractor, ("fid",)))
    samples, recipe = _live(args) if args.live else _finished(args)
    if args.save_statistics:
        _save_statistics(args, reference)
    results = compare(samples, comparisons, progress=True, **_batches(args))
    scores, told = {}, recipe()
    notes = list((told["sampling"] or {}).get("notes", []))
    notes += dict.fromkeys(note for values in results for note in values.pop("notes", ()))
    if samples.count < 10_000:
        notes.append(
            f"scores of {samples.count:,} images are biased (FID upwards, IS downwards); published tables use 50,000"
        )
    for comparison, values in zip(comparisons, results, strict=True):
        name = comparison.extractor.name
        scores |= values if name == "inception" else {f"fd_{name}": values["fid"]}
        if name not in ("inception", "dinov2"):
            notes.append(
                f"fd_{name} is the Frechet distance in features of --dinov2={args.dinov2}, at "
                f"{comparison.extractor.settings}; published FD-DINOv2 is of DINOv2 ViT-L/14 without registers"
            )
    return {"scores": scores, "notes": notes, "recipe": told | _judges(comparisons) | {"num_images": samples.count}}


def _finished(args):
    """Return the image set on disk, and a function that tells its recipe."""
    from sfd_jax.evaluation import open_image_set

    samples = open_image_set(args.samples)
    if args.num is not None and samples.count != args.num:
        raise SfdError(f"{args.samples} holds {samples.count} images, but --num={args.num}")
    told = {"samples": {"path": args.samples, "hash": samples.hash()}, "sampling": samples.recipe}
    return samples, lambda: told


def _live(args):
    """Return the sampler as an image set, and a function that tells its recipe once it has run."""
    import numpy as np

    from sfd_jax.evaluation import ImageSet

    sampler, labels, recipe, batch_size = open_sampler(args)
    nfe = []

    def pieces(_):
        nfe.clear()
        for start in range(0, len(labels), batch_size):
            part = labels[start : start + batch_size]
            images, calls = sampler(start + np.arange(len(part)), part, batch_size)
            nfe.extend(calls.tolist())
            yield images

    def tell():
        calls = {"mean": float(np.mean(nfe)), "min": min(nfe), "max": max(nfe)}
        return {"samples": "live", "sampling": recipe | {"network_calls": calls}}

    return ImageSet("the sampler", len(labels), pieces, size=(sampler.image_size,) * 2), tell


def _statistics_alone(args) -> dict:
    from sfd_jax.evaluation import open_reference

    reference = open_reference(args.reference, args.image_size)
    extractor = _save_statistics(args, reference)
    return {
        "scores": {},
        "recipe": {
            "reference": {"path": reference.name, "hash": reference.hash},
            "extractors": {extractor.name: extractor.hash},
        },
    }


def _save_statistics(args, reference):
    """Write the reference's statistics in Inception's features; return the extractor."""
    from sfd_jax.distributed import is_host0
    from sfd_jax.evaluation import gather, save_statistics

    if reference.images is None:
        raise SfdError(f"{reference.name} holds no images to take statistics of")
    extractor = _extractor("inception", args.inception)
    [(statistics, _)] = gather(
        reference.images, [extractor], keep_features=[True], progress=True, label="reference", **_batches(args)
    )
    if is_host0():
        save_statistics(args.save_statistics, statistics)
        print(args.save_statistics)
    return extractor


def _reconstruction(args) -> dict:
    from sfd_jax.evaluation import open_image_set
    from sfd_jax.evaluation.reconstruction import evaluate_reconstruction
    from sfd_jax.models.fingerprint import params_hash
    from sfd_jax.training.optimizer import average_notes

    images = open_image_set(args.reference, args.image_size)
    extractor = _extractor("inception", args.inception)
    vae = load_checkpoint("--texture_vae", args.texture_vae, weights=args.weights)
    lpips = load_checkpoint("--lpips", args.lpips) if args.lpips else None
    scores = evaluate_reconstruction(images, vae, extractor, lpips, seed=args.seed, progress=True, **_batches(args))
    recipe = {
        "images": {"path": args.reference, "hash": images.hash(), "image_size": args.image_size},
        "num_images": images.count,
        "texture_vae": {"hash": params_hash(vae[0]), "weights": args.weights, "source": vae[1].get("source")},
        "lpips": params_hash(lpips[0]) if lpips else None,
        "extractors": {extractor.name: extractor.hash},
        "seed": args.seed,
    }
    return {"scores": scores, "notes": average_notes(vae[1]), "recipe": recipe}


def _batches(args) -> dict:
    from sfd_jax.distributed import make_mesh
    from sfd_jax.evaluation import images_at_once

    mesh = make_mesh(fsdp=args.fsdp)
    return {"mesh": mesh, "batch_size": (args.eval_batch_size or images_at_once(mesh)) * mesh.size}


def _extractor(name: str, directory: str):
    from sfd_jax.evaluation import encoder_extractor, inception_extractor

    return {"inception": inception_extractor, "dinov2": encoder_extractor}[name](
        load_checkpoint(f"--{name}", directory)
    )


def _judges(comparisons) -> dict:
    """Tell what the samples were measured against, and with what."""
    import jax

    from sfd_jax import __version__

    reference = comparisons[0].reference
    return {
        "reference": {
            "path": reference.name,
            "hash": reference.hash,
            "statistics": "stored" if reference.statistics else "computed",
        },
        "extractors": {comparison.extractor.name: comparison.extractor.hash for comparison in comparisons},
        "precision_recall": "k = 3, float16 distances as in the ADM suite",
        "versions": {"sfd_jax": __version__, "jax": jax.__version__},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "evaluate", sys.argv[1:]))
