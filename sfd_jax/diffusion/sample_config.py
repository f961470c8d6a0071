"""Settings of sampling: the only place with their names, types, ranges, help and defaults.

These classes define the flags of `sfd sample` and `sfd evaluate --live`, the group `sample` of configs, the settings
in a checkpoint and the recipe of a job. Each class extends the one before, so the names form one flat list:

    SolverConfig   how to integrate
    SampleConfig   adds guidance: all that determines an image except seed, index and label
    SampleJob      adds which images, and the batch size
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from sfd_jax.diffusion.guidance import INTERVAL_GROUPS
from sfd_jax.diffusion.sde import FORMS, LAST_STEPS, Diffusion, SDEConfig
from sfd_jax.diffusion.solvers import METHODS, TABLEAUS
from sfd_jax.errors import SfdError, refuse
from sfd_jax.ranges import RULES, Range, check_fields, useless
from sfd_jax.settings import defaults_of, over_defaults, setting, to_dict

GUIDANCE = ("none", "cfg", "autoguidance")
MODES = ("staged", "released")
FEW_STEP = "few_step"
SDE_SOLVERS = {"sde_euler": "euler", "sde_heun": "heun"}

_TOLERANCE, _SCALE, _NORM = Range(float, 0, 1, above=True), Range(float, 0, 1e3), Range(float, 0, 1e3)


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """Choose how to integrate.

    Tolerances bound, in staged mode, the root mean square error of each sample's steps (`dopri5.dopri5`; trained digits
    ended about rtol from the exact flow), and in released mode torchdiffeq's error. Evaluations per step: euler one,
    heun and midpoint two, rk4 four, ab2 one plus one per stage. sde_euler (Euler-Maruyama, one) and sde_heun (two)
    integrate the stochastic equation of `sde`, with new noise in each step.

    Raises:
      SfdError: a name is unknown or a number outside its range.
    """

    solver: str = setting(
        "dopri5",
        "the integrator; all but dopri5 have fixed steps; sde_euler and sde_heun add noise in each step; few_step "
        "needs a model trained for it (docs/few_step.md)",
        choices=(*METHODS, *SDE_SOLVERS, FEW_STEP),
    )
    mode: str = setting(
        "staged",
        "staged: integrate each stage of the clocks separately; released: the released grid, masks and controller",
        choices=MODES,
        was={"published": "released"},
    )
    num_steps: int = setting(
        100, "grid points of the fixed-step solvers, both ends included", range=Range(int, 2, 10**6)
    )
    nfe: int | None = setting(
        None,
        "network evaluations of the fixed-step solvers, instead of num_steps",
        range=Range(int, 1, 10**6),
        was={0: None},
        was_called="calls",
    )
    atol: float = setting(1e-6, "dopri5's absolute tolerance", range=_TOLERANCE)
    rtol: float = setting(1e-3, "dopri5's relative tolerance", range=_TOLERANCE)
    timestep_shift: float | None = setting(
        None,
        "s of the grid s u / (1 + (s - 1) u), 0 <= u <= 1: below 1 it is finer near the noise, above near the data",
        range=Range(float, 0, 1e3, above=True),
        was={0: None},
    )
    max_nfe: int = setting(
        10_000, "network evaluations after which dopri5 gives up", range=Range(int, 8, 10**9), was_called="max_calls"
    )

    diffusion: str = setting("sbdm", "D(t) of the stochastic equation, of each group's clock", choices=tuple(FORMS))
    diffusion_norm: float = setting(1.0, "factor c of D", range=_NORM)
    diffusion_semantic: str | None = setting(None, "D of the semantic channels, if it differs", choices=tuple(FORMS))
    diffusion_norm_semantic: float | None = setting(
        None, "factor c of the semantic channels, if it differs", range=_NORM
    )
    last_step: str = setting(
        "mean",
        "last step of the stochastic equation, without noise: mean (drift), euler (flow), tweedie (expected data) or "
        "none",
        choices=LAST_STEPS,
    )
    last_step_size: float = setting(0.04, "its size on each group's clock", range=Range(float, 0, 0.5, above=True))

    def __post_init__(self):
        check_fields("sample", self)
        if self.nfe and self.solver == "dopri5":
            raise SfdError(
                f"nfe = {self.nfe} with solver {self.solver!r}: dopri5 chooses its steps by atol and rtol; leave nfe "
                "out or choose a fixed-step solver"
            )
        if self.solver == FEW_STEP and not self.nfe:
            raise SfdError("solver 'few_step' needs the number of its steps: give nfe of 1, 2 or 4")

    def points(self, segments: int = 1) -> int:
        """Return the number of points on a grid that is cut into `segments`.

        Raises:
          SfdError: `nfe` is too small for one step per segment.
        """
        if self.nfe is None:
            return self.num_steps
        tableau = TABLEAUS.get(self.solver)
        steps = self.nfe // len(tableau.nodes) if tableau else self.nfe - segments
        if steps < segments:
            least = segments * (len(tableau.nodes) if tableau else 2)
            raise SfdError(
                f"nfe = {self.nfe}: {self.solver} in {self.mode} mode needs at least {least} network evaluations, "
                f"one step for each of {segments} intervals between breakpoints"
            )
        return steps + 1

    @property
    def sde(self) -> SDEConfig | None:
        """The settings of the stochastic equation; None if the solver integrates the probability flow."""
        if self.solver not in SDE_SOLVERS:
            return None
        semantic = Diffusion(
            self.diffusion_semantic or self.diffusion,
            self.diffusion_norm if self.diffusion_norm_semantic is None else self.diffusion_norm_semantic,
        )
        return SDEConfig(
            method=SDE_SOLVERS[self.solver],
            num_steps=self.num_steps,
            texture=Diffusion(self.diffusion, self.diffusion_norm),
            semantic=semantic,
            last_step=self.last_step,
            last_step_size=self.last_step_size,
        )


@dataclasses.dataclass(frozen=True)
class SampleConfig(SolverConfig):
    """Choose how to integrate and guide.

    Raises:
      SfdError: an unknown name, a number outside its range, or a value other than the default that would have no
        effect.
    """

    guidance: str = setting("none", "the kind of guidance", choices=GUIDANCE)
    guidance_scale: float = setting(1.0, "scale of guidance, required with it; 1 means none", range=_SCALE)
    guidance_scale_semantic: float | None = setting(
        None, "AutoGuidance scale of the semantic channels, if it differs", range=_SCALE, was={-1: None}
    )
    guidance_scale_texture: float | None = setting(
        None, "AutoGuidance scale of the texture channels, if it differs", range=_SCALE, was={-1: None}
    )
    guidance_interval_start: float = setting(
        0.0, "guide a group of channels once its clock has reached this", range=Range(float, 0, 1, below=True)
    )
    guidance_interval_groups: str = setting("both", "the groups this start applies to", choices=INTERVAL_GROUPS)

    def __post_init__(self):
        super().__post_init__()
        values, defaults = to_dict(self), defaults_of(type(self))
        refuse(
            list(useless(RULES["sample"], values, {name for name in values if values[name] != defaults[name]}).values())
        )
        if self.solver == FEW_STEP and self.guidance != "none":
            raise SfdError(
                f"guidance '{self.guidance}' has no effect with solver 'few_step': the model has learned its teacher's"
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
        """Make the settings from the `sample` group of a config or checkpoint; other keys are ignored.

        A group may hold values for every solver and kind of guidance. Values without effect for the chosen ones become
        defaults. (`experiment.config_files.load_config` refuses overrides without effect.)
        """
        return cls.effective(over_defaults(cls, group))

    @classmethod
    def effective(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings, leaving out values that have no effect beside the others."""
        idle = useless(RULES["sample"], values, values)
        return cls(**{name: value for name, value in values.items() if name not in idle})


@dataclasses.dataclass(frozen=True)
class SampleJob(SampleConfig):
    """Choose how to sample, which images and how many at once."""

    num: int = setting(50_000, "N, the number of images")
    labels: str = setting(
        "balanced",
        "balanced (N/classes each, shuffled by a fixed seed), random, or classes by number or name: '207', '207,360', "
        "'otter', or with ';' where names hold commas",
    )
    batch_size: int = setting(16, "images per device and batch")
