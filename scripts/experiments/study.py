"""The runner of the studies in this folder: cells and seeds to scores, each cell an ordinary resumable run.

OUT/shared                       what all cells share, made once: autoencoders, encoder, latents (built-in data sets)
OUT/cells/NAME_sSEED/run         the training run of a cell
OUT/cells/NAME_sSEED/samples_*   its samples, by training step and guidance
OUT/cells/NAME_sSEED/*.json      their scores
OUT/STUDY.json, .md, .png        what all finished cells give

A cell with the same name is the same run in all studies of a folder.
"""

import argparse
import dataclasses
import json
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from bench import Bench, open_bench
from held_out import held_out_loss
from ml_collections import ConfigDict

from sfd_jax.distributed.mesh import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.evaluation.image_sets import open_image_set
from sfd_jax.experiment import training
from sfd_jax.experiment.checkpoints import open_checkpoint
from sfd_jax.experiment.config_files import find_config
from sfd_jax.experiment.learned_clocks import with_learned_clocks
from sfd_jax.experiment.run import train
from sfd_jax.files import differences, write_json
from sfd_jax.generation import make_sampler
from sfd_jax.generation.job import make_images
from sfd_jax.generation.labels import balanced_labels
from sfd_jax.generation.outputs import write_samples_npz
from sfd_jax.ranges import IN_PACKAGES
from sfd_jax.training.record import FREE_GROUPS, FREE_KEYS, upgraded

SYSTEMS = runpy.run_path(str(find_config("configs/sfd.py")))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a study.

    Attributes:
      name: of its folder.
      label: in tables and plots.
      variants: of configs/sfd.py, applied to the config: "plain", "repa", "synchronous", "pca", "learned_clocks".
      delta_t: lead of semantics; None leaves the clocks as they are.
    """

    name: str
    label: str
    variants: tuple[str, ...] = ()
    delta_t: float | None = None

    def config(self, base: ConfigDict, seed: int) -> ConfigDict:
        """Return the config of the run."""
        config = base.copy_and_resolve_references().unlock()
        config.seed = seed
        SYSTEMS["_choose_system"](config, list(self.variants), sizes=False)
        if self.delta_t is not None:
            config.clocks = ConfigDict({"name": "fixed_offset", "delta_t": self.delta_t})
        if "learned_clocks" in self.variants:
            SYSTEMS["learn_clocks"](config, small=base.model.input_size <= 8)
            config.probe.steps = min(config.probe.steps, config.train.steps // 2)  # at most 4 % of its FLOPs
        return config


def parse(doc: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags that all studies have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    flag = parser.add_argument
    flag("--out", type=Path, required=True, help="folder of the study; studies of one data set may share it")
    flag("--data", default="mnist", help=f"{', '.join(IN_PACKAGES)}, or a folder of latent shards (default: mnist)")
    flag("--config", help="default: configs/DATA.py:study; with a folder configs/sfd.py:xl,lr2e4; --config.KEY=VALUE")
    flag("--seeds", default="0,1,2", help="default: %(default)s")
    flag("--guidance_scale", type=float, help="classifier-free guidance (default: none)")
    flag("--num", type=int, help="samples of each cell (default: the config's)")
    flag("--prepare", action="store_true", help="only make what all cells share, before cells run on several machines")
    flag("--cells", default="1/1", metavar="K/N", help="run the K-th of N parts of the cells")
    flag("--cell", metavar="NAME_sSEED", help="run this cell alone")
    flag("--texture_vae", help="with a folder: checkpoint that made its latents")
    flag("--held_out", help="with a folder: held-out latents from the same encoders, for the corrected loss")
    flag("--pca_data", help="with a folder: latents of the same images with PCA (cell pca)")
    flag("--reference", help="with a folder: images or statistics to compare with")
    flag("--inception", help="with a folder: checkpoint of the features")
    flag("--encoder", help="with a folder: a visual encoder for the features, instead")
    args = parse_with_config(parser, argv)
    args.guided = f"_cfg{args.guidance_scale:g}" if args.guidance_scale else ""  # in names of files
    return args


def parse_with_config(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse flags of which those that begin with --config. become `overrides`, and --seeds becomes a list."""
    args, args_of_config = parser.parse_known_args(argv)
    if unknown := [each for each in args_of_config if not each.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]}")
    args.overrides, args.seeds = args_of_config, [int(seed) for seed in args.seeds.split(",")]
    return args


def run(args: argparse.Namespace, cells: list[Cell], every: bool = False) -> list[dict]:
    """Run the chosen cells that are not finished, and return the scores of all that are.

    Args:
      args: the flags.
      cells: the cells.
      every: score every checkpoint that is kept, not only the last.

    Returns:
      A record for each cell, seed and step: "cell", "label", "delta_t", "seed", "step", "scores", "seconds".
    """
    bench = open_bench(args, pca=any("pca" in cell.variants for cell in cells))
    counts = bench.base.train
    steps = [*range(counts.keep_every, counts.steps, counts.keep_every)] if every and counts.keep_every else []
    part, parts = map(int, args.cells.split("/"))
    jobs = [(cell, seed) for seed in args.seeds for cell in cells]  # whole seeds first
    chosen = [job for job in jobs if args.cell in (None, f"{job[0].name}_s{job[1]}")]
    if not (1 <= part <= parts and chosen):
        names = " ".join(f"{cell.name}_s{seed}" for cell, seed in jobs)
        raise SfdError(f"--cells={args.cells} --cell={args.cell} name no cell; cells are {names}")
    for cell, seed in [] if args.prepare else chosen[part - 1 :: parts]:
        for step in (*steps, counts.steps):
            if not finished(args, bench, cell, seed, step):
                run_cell(args, bench, cell, seed, step)
                jax.clear_caches()  # programs of finished cells
    found = [finished(args, bench, cell, seed, step) for cell, seed in jobs for step in (*steps, counts.steps)]
    return [record for record in found if record]


def _path(args: argparse.Namespace, cell: Cell, seed: int, step: int) -> Path:
    return args.out / "cells" / f"{cell.name}_s{seed}" / f"step_{step}{args.guided}.json"


def _about(bench: Bench, cell: Cell, seed: int) -> dict[str, Any]:
    """Return all that decides the scores of a cell at a given step."""
    config = cell.config(bench.base, seed).to_dict()
    of = {name: value for name, value in config.items() if name not in (*FREE_GROUPS, "data")}
    of["train"] = {name: value for name, value in of["train"].items() if name not in (*FREE_KEYS, "steps")}
    return {**bench.about, "config": of, "sample": dataclasses.asdict(bench.job)}


def finished(args: argparse.Namespace, bench: Bench, cell: Cell, seed: int, step: int) -> dict | None:
    """Return the record of a cell at a step; as `read_cell`."""
    return read_cell(_path(args, cell, seed, step), _about(bench, cell, seed))


def read_cell(path: Path, about: dict[str, Any]) -> dict | None:
    """Return a record of scores; None if it is not there yet.

    Args:
      path: its file.
      about: all that decides the scores.

    Raises:
      SfdError: it is of another configuration.
    """
    record = json.loads(path.read_text()) if path.exists() else None
    if record and (lines := differences(upgraded(record["about"]), upgraded(about)).values()):
        raise SfdError(f"{path} is of another study; choose another --out, or restore:\n  " + "\n  ".join(lines))
    return record


def run_cell(args: argparse.Namespace, bench: Bench, cell: Cell, seed: int, step: int) -> None:
    """Train, sample and score one cell at one step, from where an earlier process was stopped."""
    path, config, seconds = _path(args, cell, seed, step), cell.config(bench.base, seed), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = work()
        seconds[name] = round(time.monotonic() - start, 1)
        return result

    print(f"[{path.parent.name}] {cell.label}, seed {seed}, step {step}", flush=True)
    folder, samples = path.parent / "run", path.with_name(path.stem.replace("step", "samples"))
    config.data.path = bench.latents["pca" if "pca" in cell.variants else ""]
    config = timed("probe", lambda: with_learned_clocks(config, str(folder)))
    opened = dataclasses.replace(training.open_diffusion(config), cache=bench.small)
    timed("train", lambda: train(opened, str(folder), table=False))
    model = open_checkpoint(folder, "lightning_dit", step=step)
    sampler = make_sampler(
        model.weights,
        open_checkpoint(bench.texture_vae, "texture_vae").weights,
        bench.job,
        seed=seed,
    )
    labels, size = balanced_labels(bench.job.num, sampler.num_classes), bench.job.batch_size * make_mesh().size
    make = lambda indices, labels: sampler(indices, labels, size)
    timed("sample", lambda: make_images(make, labels, samples, recipe=sampler.recipe, batch_size=size, chunk_size=size))
    write_samples_npz(samples)
    scores = timed("score", lambda: bench.score(open_image_set(samples), labels))
    if bench.held_out and "pca" not in cell.variants and (loss := held_out_loss(model, bench.held_out, size)):
        scores["corrected_loss"] = loss
    nfe = json.loads((samples / "recipe.json").read_text())["nfe"]["mean"]
    what = {"cell": cell.name, "label": cell.label, "delta_t": cell.delta_t, "seed": seed, "step": step}
    write_json(path, {**what, "scores": scores, "nfe": nfe, "seconds": seconds, "about": _about(bench, cell, seed)})
    print(f"[{path.parent.name}] {scores} {seconds}", flush=True)
