"""Two tables of what settings may be: the ranges of all numbers, and which settings need which others.

Config groups, their dataclasses, flags and the functions that take the same settings are all checked against these
tables, so that a number out of range or a setting without effect is refused wherever it is given.
"""

import dataclasses
import numbers
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from sfd_jax.errors import nearest, refuse

IN_PACKAGES = ("digits", "mnist")  # kinds of images that ship inside packages and have no path


class Range(NamedTuple):
    """The numbers a setting takes; no range contains NaN, an infinity or a bool.

    Attributes:
      kind: int takes integers only (not 3.0), float any real number.
      least, most: ends of the range.
      above, below: exclude the end itself.
      also: one more valid value.
    """

    kind: type
    least: float
    most: float
    above: bool = False
    below: bool = False
    also: int | None = None

    def __contains__(self, value: Any) -> bool:
        kind = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        if self.also is not None and value == self.also:
            return True
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        kind = "an integer" if self.kind is int else "a number"
        start, end = (f"{end:,}" if self.kind is int else f"{end:g}" for end in (self.least, self.most))
        more = "" if self.also is None else f", or {self.also}"
        return f"{kind} {'above' if self.above else 'from'} {start} to {'below ' if self.below else ''}{end}{more}"


_COUNT, _COUNT_OR_0 = Range(int, 1, 2**31 - 1), Range(int, 0, 2**31 - 1)
_WIDTH, _WIDTH_OR_0 = Range(int, 1, 2**16), Range(int, 0, 2**16)
_FEW, _FEW_OR_0 = Range(int, 1, 1024), Range(int, 0, 1024)
_WEIGHT, _SHARE, _BELOW_1 = Range(float, 0, 1e6), Range(float, 0, 1), Range(float, 0, 1, below=True)
_ANY = Range(float, -1e15, 1e15)  # a number whose name has no range
_MESH = Range(int, 1, 2**20, also=-1)  # -1 takes what the other axis leaves


def _rows(names: str, range_: Range) -> dict[str, Range]:
    return dict.fromkeys(names.split(), range_)


# "name", or "group.name" where the name means something else in other groups; the group of a flag is its command.
RANGES = {
    # Randomness: JAX's keys and numpy's RandomState both take 32 bits, and would truncate or refuse more.
    **_rows("seed", Range(int, 0, 2**32 - 1)),
    # Networks
    **_rows("width in_channels repa_width input_dim bottleneck_dim hidden_dim z_channels ch norm_groups", _WIDTH),
    **_rows("texture_channels", _WIDTH) | _rows("semantic_channels repa_features num_registers", _WIDTH_OR_0),
    **_rows("depth num_heads repa_depth num_layers num_res_blocks transformer_heads transformer_blocks ch_mult", _FEW),
    **_rows("channels", _WIDTH) | _rows("depths", _FEW) | _rows("attention_levels", Range(int, -64, 64)),
    **_rows("input_size patch_size image_size view_size tile_size tile_grid", Range(int, 1, 2**14)),
    **_rows("mlp_ratio", Range(float, 0, 64, above=True)) | _rows("mlp_width", _WIDTH),
    **_rows("epsilon", Range(float, 0, 1, above=True)) | _rows("rope_theta", Range(float, 1, 1e9, above=True)),
    **_rows("layer_scale_init", Range(float, 0, 1e3, above=True)) | _rows("init_std", Range(float, 0, 10, above=True)),
    **_rows("model.num_classes", Range(int, 1, 10**6)) | _rows("num_classes", Range(int, 0, 10**6)),
    # The method
    **_rows("semantic_weight cosine_weight repa_weight mse_weight l1_weight kl_weight", _WEIGHT),
    **_rows("classification_weight perceptual_weight", _WEIGHT),
    **_rows("label_smoothing repa_spatial_norm", _SHARE) | _rows("label_dropout", _BELOW_1),  # at 1 no class is trained
    **_rows("curve_learning_rate", Range(float, 0, 100, above=True)) | _rows("kinetic_weight", _WEIGHT),
    **_rows("reference_offset", _SHARE),
    **_rows("loss.shift", Range(float, 0, 2**14)) | _rows("loss.scale", _BELOW_1),
    # Optimisation
    **_rows("learning_rate", Range(float, 0, 100, above=True)) | _rows("eps", Range(float, 0, 1, above=True)),
    **_rows("b1 b2 ema_decay", _BELOW_1) | _rows("weight_decay", Range(float, 0, 1e3)) | _rows("clip_norm", _WEIGHT),
    **_rows("warmup_fraction final_fraction", _SHARE) | _rows("warmup_steps constant_steps", _COUNT_OR_0),
    **_rows("steps global_batch_size accumulation log_every checkpoint_every keep_last max_bad_steps", _COUNT),
    **_rows("keep_every", _COUNT_OR_0),
    **_rows("num", Range(int, 1, 10**9)) | _rows("preview.num preview.every", _COUNT_OR_0) | _rows("images", _COUNT),
    # Data, devices and jobs
    **_rows("data mesh.fsdp", _MESH) | _rows("fsdp slices", Range(int, 1, 2**20)) | _rows("workers", _FEW_OR_0),
    **_rows("batch_size eval_batch_size shard_size chunk_size pca_images expect_count plan.images", _COUNT),
    **_rows("pca convert.semantic_channels", _WIDTH) | _rows("max_broken step weak_step", _COUNT_OR_0),
    **_rows("max_gib", Range(float, 0, 2**20, above=True)) | _rows("utilisation", Range(float, 0, 1, above=True)),
    **_rows("timeout", Range(float, 0, 1e6, above=True)),
}


class Only(NamedTuple):
    """Some settings have an effect only where another one is given, or has certain values.

    Attributes:
      names: the settings, separated by spaces.
      where: the other one, "group.name" in another group; several, separated by spaces, mean any of them.
      values: values that the other one must have; empty means that it must be given.
      never: the reverse: no effect where the other one has these values.
      hint: what else to do, for the end of the message.
    """

    names: str
    where: str
    values: tuple = ()
    never: bool = False
    hint: str = ""


# By config group; "sample" also applies to the flags of the same names.
RULES = {
    "sample": (
        Only("num_steps nfe timestep_shift", "solver", ("dopri5",), never=True, hint="dopri5 follows its tolerances"),
        Only("nfe timestep_shift mode", "solver", ("sde_euler", "sde_heun"), never=True, hint="give num_steps"),
        Only("num_steps timestep_shift mode", "solver", ("few_step",), never=True, hint="give nfe"),
        Only(
            "diffusion diffusion_norm diffusion_semantic diffusion_norm_semantic last_step last_step_size",
            "solver",
            ("sde_euler", "sde_heun"),
        ),
        Only("last_step_size", "last_step", ("none",), never=True),
        Only("atol rtol max_nfe", "solver", ("dopri5",)),
        Only("num_steps", "nfe", never=True),
        Only(
            "guidance_scale guidance_interval_start guidance_interval_groups",
            "guidance",
            ("cfg", "autoguidance"),
            hint="--weak=CKPT brings autoguidance",
        ),
        Only("guidance_scale_semantic guidance_scale_texture", "guidance", ("autoguidance",)),
        Only("guidance_interval_groups", "guidance_interval_start"),
    ),
    "optimizer": (
        Only("warmup_fraction", "warmup_steps"),
        Only("constant_steps", "schedule", ("constant_cosine",)),
        Only("final_fraction", "schedule", ("cosine", "constant_cosine")),
    ),
    "loss": (
        Only("repa_kind repa_spatial_norm", "repa_weight"),
        Only("cosine_axis", "cosine_weight"),
        Only("kl_weight", "model.variational"),
        Only("num_classes", "classification_weight"),
        Only("perceptual_weight", "lpips"),
    ),
    "model": (
        Only("hidden_dim", "arch", ("linear",), never=True),
        Only("num_layers", "arch", ("mlp", "resnet")),
        Only("num_res_blocks", "arch", ("resnet",)),
        Only("transformer_heads transformer_blocks", "arch", ("transformer",)),
        Only("repa_width", "repa_projector", ("mlp",)),
        Only("repa_depth repa_width repa_projector", "repa_features"),
    ),
    "data": (
        Only("repa_source", "loss.repa_weight"),
        Only("semantic_vae", "repa_source", ("semvae",)),
        Only("visual_encoder", "repa_source", ("online",)),
        Only("tile_grid", "repa_source", ("semvae", "online")),
        Only("view_size", "visual_encoder"),
        Only("path", "kind", IN_PACKAGES, never=True),
    ),
    "images": (
        Only("path", "kind", IN_PACKAGES, never=True),
        Only("kind path split image_size", "repa_source", ("online",)),
        Only("held_out_split", "visual_encoder"),
    ),
}


def faults(
    values: Mapping[str, Any], prefix: str = "", group: str = "", own: Mapping[str, Range | None] = {}
) -> list[str]:
    """Compare all numbers of a mapping, at any depth, with the table.

    Args:
      values: settings by name; only numbers are checked, None is "not given".
      prefix: put before each name in the sentences.
      group: of the names at the top, with its parents ("a.b").
      own: ranges by name ("a.b" below a group) from a dataclass or flag; they replace the table's.
        Fields of exchangeable parts (`of_a_part`) are checked against these only.

    Returns:
      A sentence for each number outside its range.
    """
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            inside = {key.removeprefix(f"{name}."): row for key, row in own.items() if key.startswith(f"{name}.")}
            found += faults(value, f"{prefix}{name}.", f"{group}.{name}", inside)
            continue
        row = own.get(name)
        if row is None and not of_a_part(f"{group}.{name}"):
            row = RANGES.get(f"{group.rpartition('.')[2]}.{name}", RANGES.get(name))
        for item in value if isinstance(value, (tuple, list)) else (value,):
            is_number = isinstance(item, numbers.Number) and not (isinstance(item, bool) and row is None)
            if is_number and item not in (row or _ANY):
                found.append(f"{prefix}{name}={value}: give {row or 'a finite number'}")
                break
    return found


def of_a_part(path: str) -> bool:
    """Tell whether a setting, "a.b.c", is a field of clocks or of a loss term, whose class chooses the names."""
    return re.search(r"\b(clocks|loss\.terms)\.", path) is not None


def check(group: str = "", /, **values: Any) -> None:
    """Raise SfdError where a value is outside the range of its name; None is "not given".

    Args:
      group: of the names, put before them.
      values: numbers by name.
    """
    prefix = f"{group}." if group else ""
    wrong = [f"{prefix}{name}={value!r}: give a number" for name, value in values.items() if isinstance(value, str)]
    refuse(wrong + faults(values, prefix, group))


def check_fields(group: str, settings: Any) -> None:
    """Raise SfdError where a number, bool or choice of a dataclass is out of range or has another type.

    A field may declare its own range and choices (`settings.setting`).
    """
    wrong, kinds = [], typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        choices, own = field.metadata.get("choices"), {field.name: field.metadata.get("range")}
        value, kind = getattr(settings, field.name), kinds[field.name]
        is_number = kind in (int, float, int | None, float | None)
        if kind in (bool, bool | None) and not isinstance(value, kind):
            wrong.append(f"{group}.{field.name}={value!r}: give True or False")
        elif (value is None and kind in (int, float)) or (is_number and isinstance(value, str)):
            wrong.append(f"{group}.{field.name}={value!r}: give a number")
        elif choices and value is not None and value not in choices:
            wrong.append(f"unknown {group}.{field.name} {value!r}: {nearest(str(value), choices)}")
        elif not dataclasses.is_dataclass(value):
            wrong += faults({field.name: value}, f"{group}.", group, own)
    refuse(wrong)


def useless(
    rules: Iterable[Only], values: Mapping[str, Any], given: Collection[str], spell: Callable[[str], str] = str
) -> dict[str, str]:
    """Find settings that were given and have no effect.

    Args:
      rules: a rule about a setting that is not in `values` does not apply.
      values: all settings, given or not.
      given: names of those that were given.
      spell: how a name is written in the sentences.

    Returns:
      Name -> a sentence about it.
    """
    found = {}
    for rule in rules:
        others = [name for name in rule.where.split() if name in values]
        holds = any(
            values[name] in rule.values if rule.values else values[name] not in (None, False, "") for name in others
        )
        if not others or holds != rule.never:
            continue
        among = f"={' or '.join(rule.values)}" if rule.values else ""
        why = f"{'beside' if rule.never else 'without'} {' or '.join(map(spell, others))}{among}"
        hint = f" ({rule.hint})" if rule.hint else ""
        names = filter(given.__contains__, rule.names.split())
        found |= {name: f"{spell(name)}={values[name]} has no effect {why}{hint}" for name in names}
    return found
