"""FID, sFID, IS, precision and recall of samples, as the ADM suite defines them.

  sfd evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=DIR --out=scores.json
  sfd evaluate --live --checkpoint=DIR --texture_vae=DIR --reference=... --inception=... --out=scores.json
  sfd evaluate --reference=photos/ --image_size=256 --inception=DIR --save_statistics=photos.npz
  sfd evaluate --reconstruction --texture_vae=DIR --reference=photos/ --image_size=256 --inception=DIR --lpips=DIR

--samples is an npz with arr_0, a folder of PNGs, or the folder of `sfd sample`; --live evaluates the sampler
directly, without images on disk. --reference is an ADM reference batch (whose mu, sigma, mu_s, sigma_s are
used if present), a folder of images, or a statistics file written by --save_statistics. Statistics store the
extractor that made them, and are refused with another. --inception is the converted pt_inception-2015-12-05;
--dinov2 adds the Frechet distance in DINOv2 features.

The scores are printed and written to --out as JSON, together with what determines them: hashes of checkpoints,
statistics, extractor and reference, sampler, network evaluations, labels, dtype, seed and N. Existing files are
not overwritten. Lines that begin with "note:" state assumptions.
"""

import argparse
import json
from pathlib import Path

from sfd_jax.cli.flags import command_parser, local_path, parse_command, path
from sfd_jax.cli.sampling_flags import ONLY_SAMPLING, SAMPLING_RULES, add_sampling_flags
from sfd_jax.errors import Faults, SfdError
from sfd_jax.experiment.sampling import check_flags, open_sampler
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
    """Evaluate, print, and write JSON."""
    args = _parse(argv)

    from sfd_jax import distributed
    from sfd_jax.distributed.preflight import Job

    checkpoints = (args.checkpoint, args.texture_vae, args.weak, args.inception, args.dinov2, args.lpips)
    distributed.start(Job({"flags": vars(args)}, needs=(args.samples, args.reference, *checkpoints)))
    report = _report(args)
    if distributed.is_host0():
        for name, value in report["scores"].items():
            print(f"{name:<10} {value:.6g}")
        for note in report["notes"]:
            print(f"note: {note}")
        if args.out:
            try:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                write_new(args.out, json.dumps(report, indent=2) + "\n")
            except OSError as error:
                raise SfdError(f"cannot write {args.out}: {error}") from error
            print(args.out)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags, and refuse early what would fail later."""
    parser = command_parser("evaluate", __doc__)
    flag = parser.add_argument
    flag("--samples", type=local_path, metavar="PATH", help="images to evaluate")
    flag("--live", action="store_true", help="evaluate the sampler directly; its flags are below")
    flag(
        "--reconstruction",
        action="store_true",
        help="evaluate --texture_vae by its reconstructions of the reference's images",
    )
    flag("--reference", type=local_path, required=True, metavar="PATH", help="what to compare with")
    flag(
        "--image_size",
        type=int,
        default=None,
        help="crop a reference folder's images to this size, as the ADM suite does (default: no change)",
    )
    flag("--inception", type=path, metavar="DIR", help="checkpoint of the 2015 Inception, made by `sfd convert`")
    flag(
        "--dinov2",
        type=path,
        metavar="DIR",
        help="DINOv2 checkpoint: adds fd_dinov2, the Frechet distance in its class tokens; for encoders other than "
        "the released ViT-L/14 the score is named fd_ENCODER",
    )
    flag("--lpips", type=path, metavar="DIR", help="checkpoint of LPIPS; without it --reconstruction leaves lpips out")
    flag(
        "--metrics",
        default="fid,sfid,is,precision,recall",
        help="comma-separated list of fid, sfid, is, precision, recall, kid (default: %(default)s)",
    )
    flag("--out", type=local_path, metavar="FILE", help="JSON file for scores and recipe")
    flag(
        "--save_statistics",
        type=local_path,
        metavar="FILE",
        help="write the reference's statistics and features, for use as --reference",
    )
    flag(
        "--eval_batch_size",
        type=int,
        help="images per device for features; changes nothing but speed (default: 8 on a CPU, 32 elsewhere)",
    )
    add_sampling_flags(parser, required=False)
    args = parse_command(parser, argv, rules=RULES)

    found = Faults()
    if sum(map(bool, (args.samples, args.live, args.reconstruction))) > 1:
        found.append("give one of --samples, --live and --reconstruction")
    if not (args.samples or args.live or args.reconstruction or args.save_statistics):
        found.append("nothing to evaluate: give --samples=PATH, --live, --reconstruction or --save_statistics=FILE")
    if not args.inception and (args.reconstruction or args.save_statistics or not args.dinov2):
        found.append("scores need features: give --inception=DIR (`sfd fetch inception` says where to get it)")
    if args.reconstruction and not args.texture_vae:
        found.append("--reconstruction needs --texture_vae=DIR")
    if args.image_size is not None and Path(args.reference).is_file():
        found.append(f"--image_size={args.image_size} has no effect: {args.reference} is not a folder of images")
    args.metrics = tuple(dict.fromkeys(filter(None, map(str.strip, args.metrics.split(",")))))
    with found:
        if args.live:
            check_flags(args)
    with found:
        from sfd_jax.experiment.evaluation import check_metrics

        check_metrics(args.metrics)
    for file in filter(None, (args.out, args.save_statistics)):
        if Path(file).exists():
            found.append(f"{file} exists already and is not overwritten; choose another name")
    found.stop()
    return args


def _report(args: argparse.Namespace) -> dict:
    """Open what the flags name and evaluate it."""
    from sfd_jax.evaluation import Comparison, open_image_set, open_reference
    from sfd_jax.experiment import evaluation
    from sfd_jax.experiment.checkpoints import open_checkpoint

    devices = evaluation.Devices.of(args.fsdp, args.eval_batch_size)
    extractors = {
        name: evaluation.open_extractor(name, path)
        for name, path in (("inception", args.inception), ("dinov2", args.dinov2))
        if path
    }
    if args.reconstruction:
        images = open_image_set(args.reference, args.image_size)
        vae = open_checkpoint(args.texture_vae, "texture_vae", flag="--texture_vae", weights=args.weights)
        lpips = open_checkpoint(args.lpips, "lpips", flag="--lpips") if args.lpips else None
        how = {"seed": args.seed, "image_size": args.image_size, "devices": devices}
        return evaluation.report_reconstruction(images, vae, extractors["inception"], lpips, **how)
    reference = open_reference(args.reference, args.image_size)
    comparisons = []
    if "inception" in extractors:
        comparisons.append(Comparison(reference, extractors["inception"], args.metrics))
    if "dinov2" in extractors:
        own = reference.for_extractor(extractors["dinov2"])
        comparisons.append(Comparison(own, extractors["dinov2"], ("fid",)))
    if args.live:
        samples, get_recipe = evaluation.image_set_of_sampler(*open_sampler(args))
    elif args.samples:
        samples = open_image_set(args.samples)
        if args.num is not None and samples.count != args.num:
            raise SfdError(f"{args.samples} holds {samples.count} images, but --num={args.num}")
        recipe = {"samples": {"path": args.samples, "hash": samples.hash()}, "sampling": samples.recipe}
        get_recipe = lambda: recipe
    if args.save_statistics:
        report = evaluation.report_statistics(reference, extractors["inception"], args.save_statistics, devices)
        if not (args.live or args.samples):
            return report
    return evaluation.report_samples(samples, get_recipe, comparisons, devices)
