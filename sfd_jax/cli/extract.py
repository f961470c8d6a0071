"""Images to latent shards with statistics; or released shards to ours.

  sfd extract --images=folder --path=IMAGENET --split=train --out=DIR
      --texture_vae=CKPT --visual=CKPT --semantic_vae=CKPT
      encode every image: texture latents, semantic latents, and both of the mirrored image
  sfd extract ... --pca=8
      semantic latents from principal components instead of a Semantic VAE; fitted first
  sfd extract --repack=FOLDER --out=DIR
      turn latents_rankRR_shardNNN.safetensors into our shards, without encoding anything
  sfd extract ... --check
      look for faults before a long job, in seconds, and write nothing

A folder or tar holds class folders (or class tars), below the name of the split or as they are. Labels number the
sorted names; folders that are all numbers are labels by number. Hidden entries are left out; what else is no class is
refused. An image of more than 89,478,485 pixels is a broken one; sfd_jax/data/decoding.py tells what becomes of
transparency, animations and grey of more than 8 bits.

CKPT are folders that `sfd convert` or one of the training doors made. Without --visual only texture
latents are made. 512 px images are shown to the visual encoder in quarters of 256 px.

The shards, their manifest and the statistics appear in DIR. Killed and started again with the same
flags, the job goes on behind the last finished shard. On several hosts, start the same command on
all of them: they share the shards; DIR must be one folder for all.
"""

import functools
import itertools
import math
from pathlib import Path

from sfd_jax.cli.flags import door_parser, local_path, parse_door, path
from sfd_jax.errors import SfdError
from sfd_jax.ranges import Only

RULES = (
    Only("statistics", "repack"),
    Only(
        "images path split image_size texture_vae visual semantic_vae pca pca_images weights tile_size "
        "texture_posterior semantic_posterior flips batch_size max_broken seed",
        "repack",
        never=True,
    ),
    Only("path", "images", ("digits",), never=True),
    Only("pca_images", "pca"),
    Only("semantic_posterior", "semantic_vae"),
    Only("tile_size", "visual"),
    Only("expect_count", "check"),
)


def main(argv: list[str]) -> int:
    """Open the door: extract, repack or check, as the flags say."""
    args = _parse(argv)
    if args.repack:
        return _check_repack(args) if args.check else _repack(args)
    if not (args.images and args.texture_vae):
        raise SfdError("say what to encode and with what: --images and --texture_vae (or --repack)")
    if args.semantic_vae and args.pca:
        raise SfdError("--semantic_vae and --pca both make the semantic latents: give one of them")
    if args.visual and not (args.semantic_vae or args.pca):
        raise SfdError("--visual needs --semantic_vae=CKPT or --pca=CHANNELS to compress its features")
    if (args.semantic_vae or args.pca or args.repa) and not args.visual:
        raise SfdError("semantic latents and REPA features need --visual=CKPT")
    return _extract(args)


def _parse(argv: list[str]):
    import argparse

    parser = door_parser("extract", __doc__)
    flag = parser.add_argument
    flag("--out", type=local_path, required=True, help="folder of the latent shards")
    flag("--images", help="folder, tar, tfds or digits")
    flag("--path", type=local_path, default="", help="the folder, the tar, or the name of the TFDS data set")
    flag("--split", default="train", help="folder in PATH; --split= reads PATH itself (default: %(default)s)")
    flag("--image_size", type=int, default=256, help="pixels a side (default: %(default)s)")
    flag("--texture_vae", type=path, metavar="CKPT", help="checkpoint of the texture VAE")
    flag("--visual", type=path, metavar="CKPT", help="checkpoint of the visual encoder (DINOv2)")
    flag("--semantic_vae", type=path, metavar="CKPT", help="checkpoint of the Semantic VAE")
    flag("--pca", type=int, metavar="CHANNELS", help="principal components instead of it")
    flag("--pca_images", type=int, default=50_000, help="images to fit them on (default: %(default)s)")
    flag("--weights", choices=("ema", "raw"), default="ema", help="of checkpoints that hold both")
    flag("--tile_size", type=int, default=256, help="pixels a side that the visual encoder sees at once")
    flag("--texture_posterior", choices=("sample", "mean"), default="sample")
    flag("--semantic_posterior", choices=("sample", "mean"), default="sample")
    flag("--flips", action=argparse.BooleanOptionalAction, default=True, help="mirrored images too")
    flag("--repa", action="store_true", help="store the visual features as well (large: see README)")
    flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the stored latents")
    flag("--batch_size", type=int, default=64, help="images a host encodes at once (default: 64)")
    flag("--shard_size", type=int, default=4096, help="images a shard (default: %(default)s)")
    flag("--workers", type=int, default=0, help="processes that read images (default: threads)")
    flag("--max_broken", type=int, default=0, help="broken images to go on with, over all hosts (default: 0)")
    flag("--expect_count", type=int, help="with --check: images there must be (ImageNet's are known)")
    flag("--seed", type=int, default=0, help="of the posterior samples (default: %(default)s)")
    flag("--repack", type=local_path, metavar="FOLDER", help="folder of released shards, instead of images")
    flag(
        "--statistics",
        choices=("released", "measured"),
        default="released",
        help="with --repack: take *_stats.pt, which go with the released weights, or measure",
    )
    flag("--check", action="store_true", help="only look for faults")
    return parse_door(parser, argv, rules=RULES)


def _extract(args) -> int:
    import jax

    from sfd_jax.data.extract import extract
    from sfd_jax.data.images import open_images
    from sfd_jax.distributed import hosts
    from sfd_jax.distributed.heartbeat import Heartbeat
    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.distributed.preflight import Job
    from sfd_jax.models.fingerprint import params_hash
    from sfd_jax.models.latent_encoder import jit_encoder

    source = open_images(args.images, args.path, args.split, args.image_size)
    needs = (args.texture_vae, args.visual, args.semantic_vae)
    hosts.start(Job({"flags": vars(args), "images": len(source)}, args.out, needs=needs))
    for note in source.notes:
        hosts.say(f"note: {note}")
    encoder, params, checkpoints = _encoder(args)
    mesh, sharding, whole = _shardings(args.batch_size)
    params = jax.device_put(params, whole)
    if args.check:
        return _check_extract(args, source, encoder, params)
    jitted, done = jit_encoder(encoder, mesh), itertools.count(1)

    def encode(pixels, index):
        if not isinstance(pixels, jax.core.Tracer):  # the engine also asks for the shapes alone
            heartbeat.at(next(done) * len(pixels))
        return jitted(params, pixels, index)

    with FolderLock(args.out), Heartbeat(args.out, "extract") as heartbeat:
        if args.pca:
            params["pca"] = _pca(args, source, encoder, params, sharding, whole)
        store = extract(
            source,
            encode,
            args.out,
            batch_size=args.batch_size,
            config=_config(args, checkpoints),
            weights={name: params_hash(jax.device_get(tree)) for name, tree in params.items()},
            dtype=args.dtype,
            shard_size=args.shard_size,
            sharding=sharding,
            workers=args.workers,
            max_broken=args.max_broken,
            **_share(),
        )
    hosts.say(_summary(store))
    return 0


def _encoder(args):
    """Return the encoder, its parameters, and which checkpoints they are from."""
    from sfd_jax.distributed import hosts
    from sfd_jax.experiment.sampling import load_checkpoint
    from sfd_jax.latents import other_makers
    from sfd_jax.models import network_of
    from sfd_jax.models.fingerprint import params_hash
    from sfd_jax.models.latent_encoder import LatentEncoder, VisualEncoder
    from sfd_jax.models.layers import check_divides
    from sfd_jax.training.optimizer import average_notes

    networks, params, checkpoints = {}, {}, {}
    wanted = {"texture_vae": args.texture_vae, "visual": args.visual, "semantic_vae": args.semantic_vae}
    for name, path in wanted.items():
        if path:
            params[name], metadata = load_checkpoint(f"--{name}", path, weights=args.weights)
            networks[name] = network_of(metadata, "dinov2" if name == "visual" else name)
            checkpoints[name] = {key: metadata.get(key) for key in ("source", "step")}
            for note in average_notes(metadata):
                hosts.say(f"note: {note}")
    texture, visual = networks["texture_vae"], None
    check_divides(args.image_size, texture.config.downsampling, "the texture VAE's downsampling")
    if "visual" in networks:
        # The size at which its patches are as many as the texture latents (256 px: 16 x 14 = 224).
        tile = min(args.image_size, args.tile_size)
        check_divides(tile, texture.config.downsampling, "the texture VAE's downsampling (--tile_size)")
        view = tile // texture.config.downsampling * networks["visual"].config.patch_size
        visual = VisualEncoder(networks["visual"], view_size=view, tile_size=args.tile_size)
    if "semantic_vae" in networks:
        trained_on = metadata.get("latents") or {}  # of its checkpoint, the last one read
        if differing := other_makers({"weights": {"visual": params_hash(params["visual"])}}, trained_on):
            raise SfdError(f"--semantic_vae={args.semantic_vae} was trained on features of another {differing[0]}")
        side, tokens = tile // texture.config.downsampling, trained_on.get("tokens")
        # Other architectures take each token by itself.
        if networks["semantic_vae"].config.arch == "transformer" and tokens not in (None, side**2):
            raise SfdError(
                f"--semantic_vae={args.semantic_vae} was trained on {tokens} tokens at once, but a tile of {tile} px "
                f"has {side**2}: --tile_size={math.isqrt(tokens) * texture.config.downsampling} would do"
            )
    encoder = LatentEncoder(
        texture,
        visual,
        networks.get("semantic_vae"),
        texture_posterior=args.texture_posterior,
        semantic_posterior=args.semantic_posterior,
        flips=args.flips,
        repa=args.repa,
        seed=args.seed,
    )
    return encoder, params, checkpoints


def _shardings(batch_size: int):
    """Return this host's devices as a mesh, and how a batch and how the parameters lie on it."""
    import jax

    from sfd_jax.distributed.mesh import make_mesh
    from sfd_jax.distributed.sharding import batch_sharding, replicated

    devices = jax.local_devices()
    if batch_size % len(devices):
        raise SfdError(f"--batch_size={batch_size} must be a multiple of this host's {len(devices)} devices")
    mesh = make_mesh(devices=devices)
    return mesh, batch_sharding(mesh), replicated(mesh)


def _pca(args, source, encoder, params, sharding, whole) -> dict:
    """Read the components in the output folder, or fit and save them; the same on every host."""
    import jax
    import numpy as np
    from tqdm import tqdm

    from sfd_jax.data.images import Tolerant
    from sfd_jax.data.pca import fit_pca, load_pca, save_pca
    from sfd_jax.data.pipeline import make_eval_batches
    from sfd_jax.distributed import hosts
    from sfd_jax.models.latent_encoder import to_float

    path = Path(args.out) / "pca.npz"
    if not path.exists() and hosts.is_host0():
        path.parent.mkdir(parents=True, exist_ok=True)
        count = min(args.pca_images, len(source))
        # Every n-th image: the order of a source is by class.
        indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
        batches = make_eval_batches(Tolerant(source), batch_size=args.batch_size, indices=indices, workers=args.workers)
        features = jax.jit(lambda params, pixels: encoder.visual.features(params, to_float(pixels)))

        def parts():
            for batch in tqdm(batches, desc="fit PCA", total=-(-len(indices) // args.batch_size), disable=None):
                tokens = features(params["visual"], jax.device_put(batch["pixels"], sharding))
                yield np.asarray(tokens)[batch["mask"] & (batch["broken"] == "")]

        save_pca(path, fit_pca(parts(), args.pca))
    hosts.barrier("extract: PCA fitted", timeout=3600.0)
    pca = load_pca(path)
    hosts.say(f"PCA: {pca['components'].shape[1]} channels keep {pca['explained'].sum():.1%} of the variance")
    if pca["components"].shape[1] != args.pca:
        raise SfdError(f"{path} holds {pca['components'].shape[1]} channels, not {args.pca}; use another --out")
    return jax.device_put({name: pca[name] for name in ("mean", "components")}, whole)


def _config(args, checkpoints: dict) -> dict:
    """Return what decides the latents, for the manifest; paths may differ between two machines."""
    names = (
        "images",
        "split",
        "image_size",
        "tile_size",
        "texture_posterior",
        "semantic_posterior",
        "flips",
        "repa",
        "pca",
        "weights",
        "seed",
    )
    config = {name: getattr(args, name) for name in names}
    return config | {"pca": args.pca or 0, "checkpoints": checkpoints}  # 0, as stores begun before say it


def _share() -> dict:
    """Return which part of the shards is this host's, and whose bar is shown."""
    import jax

    from sfd_jax.distributed import hosts

    return {
        "host_index": jax.process_index(),
        "host_count": jax.process_count(),
        "barrier": functools.partial(hosts.barrier, timeout=24 * 3600.0),  # JAX knows whether the others live
        "progress": None if hosts.is_host0() else False,
    }


def _repack(args) -> int:
    from sfd_jax.data.extract import repack
    from sfd_jax.data.published import PublishedLatents
    from sfd_jax.distributed import hosts
    from sfd_jax.distributed.heartbeat import Heartbeat
    from sfd_jax.distributed.lock import FolderLock
    from sfd_jax.distributed.preflight import Job

    source = PublishedLatents(args.repack, repa=args.repa)
    statistics = _released_statistics(args, source)
    hosts.start(Job({"flags": vars(args), "images": len(source)}, args.out))
    for note in source.notes:
        hosts.say(f"note: {note}")
    with FolderLock(args.out), Heartbeat(args.out, "extract"):
        store = repack(
            source,
            args.out,
            dtype=args.dtype,
            shard_size=args.shard_size,
            statistics=statistics,
            workers=args.workers,
            **_share(),
        )
    hosts.say(_summary(store))
    return 0


def _released_statistics(args, source):
    """Read `*_stats.pt` beside the released shards; None where statistics are to be measured."""
    from sfd_jax.convert.weight_files import read_statistics
    from sfd_jax.data.published import released_statistics

    if args.statistics == "measured":
        return None
    try:
        return released_statistics(source, read_statistics)
    except SfdError as error:
        raise SfdError(f"{error}; or take --statistics=measured (which does not suit the released weights)") from error


def _check_extract(args, source, encoder, params) -> int:
    import jax
    import numpy as np

    from sfd_jax.data.checks import check_images, check_writable

    faults = check_images(source, split=args.split, expected_count=args.expect_count, max_broken=args.max_broken)
    if args.pca and "pca" not in params:
        width = encoder.visual.network.config.width
        shapes = {"mean": (width,), "components": (width, args.pca)}
        params = params | {"pca": {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items()}}
    pixels = jax.ShapeDtypeStruct((1, args.image_size, args.image_size, 3), np.uint8)
    shapes = jax.eval_shape(encoder, params, pixels, jax.ShapeDtypeStruct((1,), np.int32))
    width = {"bfloat16": 2, "float32": 4}[args.dtype]
    image = sum(int(np.prod(leaf.shape)) * (2 if name.startswith("repa") else width) for name, leaf in shapes.items())
    print(f"{len(source):,} images, {image:,} bytes each: {len(source) * image / 1e9:.2f} GB in all")
    return _report(faults + check_writable(args.out, int(1.02 * image * len(source))))


def _check_repack(args) -> int:
    import numpy as np

    from sfd_jax.data.checks import check_writable
    from sfd_jax.data.published import PublishedLatents

    faults = []
    source = PublishedLatents(args.repack, repa=args.repa)
    for note in source.notes:
        print(f"note: {note}")
    try:
        _released_statistics(args, source)
    except SfdError as error:
        faults.append(str(error))
    if args.expect_count is not None and len(source) != args.expect_count:
        faults.append(f"the released shards hold {len(source):,} images, not {args.expect_count:,}")
    width = {"bfloat16": 2, "float32": 4}[args.dtype]
    image = sum(
        int(np.prod(shape)) * (2 if name.startswith("repa") else width) for name, (_, shape) in source.fields.items()
    )
    print(f"{len(source):,} images, {image:,} bytes each: {len(source) * image / 1e9:.2f} GB in all")
    return _report(faults + check_writable(args.out, int(1.02 * image * len(source))))


def _report(faults: list[str]) -> int:
    if faults:
        raise SfdError(f"{len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    print("no faults found")
    return 0


def _summary(store) -> str:
    manifest = store.manifest
    size = sum(shard["bytes"] for shard in store.shards)
    lines = [
        f"{len(store):,} images in {len(store.shards)} shards, {size / 1e9:.3f} GB, "
        f"{size / max(1, len(store)):,.0f} bytes an image: {store.directory}"
    ]
    if other := _unlike(manifest):
        lines.append(f"note: {other}")
    lines += [f"skipped {fault['name']}: {fault['reason']}" for fault in manifest["skipped"]]
    return "\n".join(lines)


def _unlike(manifest: dict) -> str:
    """Return a sentence where released statistics do not describe the latents they came with, else ""."""
    import numpy as np

    for group in ("texture", "semantic"):
        mean, std, true_mean, true_std = (
            np.array(manifest[kind][f"{group}_{name}"])
            for kind in ("statistics", "measured_statistics")
            for name in ("mean", "std")
        )
        shift, ratio = np.abs(true_mean - mean) / std, true_std / std
        if shift.size and (shift.max() > 1 or ratio.max() > 2 or ratio.min() < 0.5):
            return (
                f"the released {group} statistics are not those of these latents: normalised by them, channels have "
                f"means up to {shift.max():.2g} from 0 and standard deviations from {ratio.min():.2g} to {ratio.max():.2g}"
            )
    return ""


if __name__ == "__main__":
    import sys

    from sfd_jax.cli.main import open_door

    sys.exit(open_door(main, "extract", sys.argv[1:]))
