"""How to sample: each setting's name, type, range, help and default, once.

The flags of `sfd sample` and `sfd evaluate --live`, the group `sample` of configs, what a checkpoint keeps of it and a
job's recipe are made of these classes. Each adds to the one before, so that all of it is one flat list of names:

    SolverConfig   how to integrate
    SampleConfig   and with what guidance: all that decides an image but its seed, index and label
    SampleJob      and which images, how many at once
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from sfd_jax.diffusion.guidance import INTERVAL_GROUPS
from sfd_jax.diffusion.solvers import METHODS, TABLEAUS
from sfd_jax.errors import SfdError, refuse
from sfd_jax.ranges import RULES, Range, check_fields, useless
from sfd_jax.settings import defaults_of, over_defaults, setting, to_dict

GUIDANCE = ("none", "cfg", "autoguidance")
MODES = ("staged", "released")

_TOLERANCE, _SCALE = Range(float, 0, 1, above=True), Range(float, 0, 1e3)


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Choose how to integrate.

    Tolerances: in staged mode of a sample's steps in root mean square (`dopri5.dopri5`; trained digits ended about rtol
    from the exact flow), in released mode as torchdiffeq's. Evaluations a step: heun and midpoint two, rk4 four, euler
    one, ab2 one and one more in each stage.

    Raises:
      SfdError: a name is unknown or a number outside its range.
    """

    solver: str = setting("dopri5", "the integrator; all but dopri5 take fixed steps", choices=METHODS)
    mode: str = setting(
        "staged",
        "staged: every stage of the clocks on its own; released: the released grid, masks and controller",
        choices=MODES,
        was={"published": "released"},
    )
    num_steps: int = setting(
        100, "grid points, ends included, of other solvers than dopri5", range=Range(int, 2, 10**6)
    )
    nfe: int | None = setting(
        None,
        "network evaluations that those may take, instead of num_steps",
        range=Range(int, 1, 10**6),
        was={0: None},
        was_called="calls",
    )
    atol: float = setting(1e-6, "dopri5's absolute tolerance", range=_TOLERANCE)
    rtol: float = setting(1e-3, "dopri5's relative tolerance", range=_TOLERANCE)
    timestep_shift: float | None = setting(
        None,
        "s in s u / (1 + (s - 1) u) on the normalised grid: below 1 finer near the noise, above near the data",
        range=Range(float, 0, 1e3, above=True),
        was={0: None},
    )
    max_nfe: int = setting(
        10_000, "network evaluations after which dopri5 gives up", range=Range(int, 8, 10**9), was_called="max_calls"
    )

    def __post_init__(self):
        check_fields("sample", self)
        if self.nfe and self.solver == "dopri5":
            raise SfdError(
                f"nfe = {self.nfe} with solver {self.solver!r}: a budget of network evaluations is for the "
                "solvers of fixed steps; dopri5 follows its tolerances"
            )

    def points(self, segments: int = 1) -> int:
        """Return the number of points on a grid that is cut into `segments`.

        Raises:
          SfdError: `nfe` does not reach for a step in each segment.
        """
        if self.nfe is None:
            return self.num_steps
        tableau = TABLEAUS.get(self.solver)
        steps = self.nfe // len(tableau.nodes) if tableau else self.nfe - segments
        if steps < segments:
            least = segments * (len(tableau.nodes) if tableau else 2)
            raise SfdError(
                f"nfe = {self.nfe}: {self.solver} in {self.mode} mode needs at least {least} network evaluations, "
                f"a step for each of {segments} stretches between breakpoints"
            )
        return steps + 1


@dataclasses.dataclass(frozen=True)
class SampleConfig(SolverConfig):
    """Say how to sample.

    Raises:
      SfdError: an unknown name, a number outside its range, or a value other than the default that would have no
        effect.
    """

    guidance: str = setting("none", "which other velocity to lead away from", choices=GUIDANCE)
    guidance_scale: float = setting(1.0, "needed with guidance; 1 would be none", range=_SCALE)
    guidance_scale_semantic: float | None = setting(
        None, "AutoGuidance's scale of the semantic channels, where it differs", range=_SCALE, was={-1: None}
    )
    guidance_scale_texture: float | None = setting(
        None, "the same of the texture channels", range=_SCALE, was={-1: None}
    )
    guidance_interval_start: float = setting(
        0.0, "guide a group of channels once its clock has reached this", range=Range(float, 0, 1, below=True)
    )
    guidance_interval_groups: str = setting("both", "which groups heed the start", choices=INTERVAL_GROUPS)

    def __post_init__(self):
        super().__post_init__()
        values, defaults = to_dict(self), defaults_of(type(self))
        refuse(
            list(useless(RULES["sample"], values, {name for name in values if values[name] != defaults[name]}).values())
        )
        scales = [
            self.guidance_scale if scale is None else scale
            for scale in (self.guidance_scale_semantic, self.guidance_scale_texture)
        ]
        if self.guidance != "none" and scales == [1, 1]:
            raise SfdError(
                f"guidance '{self.guidance}' with guidance_scale=1 is no guidance: give another scale, such as 1.5, or "
                "guidance 'none'"
            )

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """Take the fields from a config's `sample` group, which may hold others too, or from a checkpoint's.

        A group says what to take with every solver and kind of guidance; of what its own have no use for, the
        default is taken. (Overrides without effect are refused by `experiment.config_files.load_config`.)
        """
        return cls.effective(over_defaults(cls, group))

    @classmethod
    def effective(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings of those values that have an effect beside the others."""
        idle = useless(RULES["sample"], values, values)
        return cls(**{name: value for name, value in values.items() if name not in idle})


@dataclasses.dataclass(frozen=True)
class SampleJob(SampleConfig):
    """Say how to sample, and which images."""

    num: int = setting(50_000, "N, how many images")
    labels: str = setting(
        "balanced",
        "balanced (N/classes each, shuffled by a fixed seed), random, or classes by number or name: '207', '207,360', "
        "'otter', or with ';' where names hold commas",
    )
    batch_size: int = setting(16, "images per device at once")
