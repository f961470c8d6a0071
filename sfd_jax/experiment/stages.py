"""How one image emerges: its semantic latent and its decoded texture at several times, for pictures and pages."""

import base64
import dataclasses
import io
import json
import uuid

import numpy as np
from PIL import Image

from sfd_jax.experiment.demo.pictures import semantic_colours
from sfd_jax.generation import Sampler

_SLIDER = """
<div id="NAME" style="max-width: 32rem">
<div style="display: flex; gap: 2rem">FIGURES</div>
<label>tau <input type="range" min="0" max="LAST" value="LAST" style="width: 80%"> <output></output></label>
</div>
<script>
{
  const frames = FRAMES, all = document.getElementById("NAME"), slider = all.querySelector("input");
  const show = () => {
    const frame = frames[slider.value];
    all.querySelector("output").textContent = frame.tau.toFixed(2);
    for (const group of ["semantic", "texture"]) {
      all.querySelector(`.${group} img`).src = frame[group];
      all.querySelector(`.${group} figcaption`).textContent = `${group}, t = ${frame["t_" + group].toFixed(2)}`;
    }
  };
  slider.addEventListener("input", show);
  show();
}
</script>
"""
_FIGURE = (
    '<figure class="{0}" style="margin: 0; text-align: center"><img alt="{0}" style="width: 14rem; height: 14rem; '
    'image-rendering: pixelated"><figcaption></figcaption></figure>'
)


@dataclasses.dataclass(frozen=True)
class Stages:
    """One image at T times. A notebook shows it with a slider.

    Attributes:
      taus, t_semantic, t_texture: (T,) global time and the two clocks.
      semantic: (T, h, w, 3) uint8, the semantic latent's three principal components as colours.
      texture: (T, H, W, 3) uint8, the decoded texture.
    """

    taus: np.ndarray
    t_semantic: np.ndarray
    t_texture: np.ndarray
    semantic: np.ndarray
    texture: np.ndarray

    def html(self) -> str:
        """Return an HTML fragment with a slider over the times; it needs no network."""
        frames = [
            dict(tau=float(tau), t_semantic=float(a), t_texture=float(b), semantic=data_uri(s), texture=data_uri(t))
            for tau, a, b, s, t in zip(*dataclasses.astuple(self), strict=True)
        ]
        figures = "".join(_FIGURE.format(group) for group in ("semantic", "texture"))
        parts = {"NAME": f"stages-{uuid.uuid4().hex[:8]}", "FIGURES": figures, "LAST": str(len(frames) - 1)}
        text = _SLIDER
        for name, part in parts.items():
            text = text.replace(name, part)
        return text.replace("FRAMES", json.dumps(frames))

    _repr_html_ = html


def follow(sampler: Sampler, label: int, number: int, *, index: int = 0, reference: np.ndarray | None = None) -> Stages:
    """Follow one sample from noise to image.

    Args:
      sampler: of the model.
      label: its class.
      number: of times, evenly spaced from 0 to the end.
      index: which sample of the seed.
      reference: (M, h, w, C) float, clean semantic latents that fix the colours; by default the sample's at the end.

    Raises:
      SfdError: the sampler's solver cannot stop at these times.
    """
    taus = np.linspace(0, sampler.clocks.tau_end, number)
    latents, decoded = sampler.trajectory(np.array([index]), np.array([label]), taus)
    semantic = sampler.layout.split(latents[:, 0])[1]
    if semantic.shape[-1] < 3:  # a system of texture alone has no semantics to show
        colours = np.zeros((number, 1, 1, 3))
    else:
        colours = semantic_colours(semantic, semantic[-1:] if reference is None else reference)
    times = map(np.asarray, sampler.clocks.times(taus))
    return Stages(taus, *times, (255 * colours).round().astype(np.uint8), decoded[:, 0])


def data_uri(picture: np.ndarray | bytes) -> str:
    """Return an image uint8 (H, W, 3), or a PNG file's bytes, as a data URI."""
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(buffer := io.BytesIO(), format="PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()
