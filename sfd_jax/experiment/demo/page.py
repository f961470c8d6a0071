"""The demo's report as one HTML file: pictures inside, and a slider over the stages of an image; needs no network."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from sfd_jax.files import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; }
#stages div { display: flex; gap: 2rem; } #stages figure { margin: 0; text-align: center; }
#stages img { width: 14rem; height: 14rem; image-rendering: pixelated; } #tau { width: 30rem; max-width: 100%; }
"""
_SLIDER = """
<div id="stages">
<div><figure><img id="semantic" alt="semantic latent"><figcaption id="t_semantic"></figcaption></figure>
<figure><img id="texture" alt="decoded texture"><figcaption id="t_texture"></figcaption></figure></div>
<label>tau <input type="range" id="tau" min="0" max="LAST" value="LAST"> <output id="at"></output></label>
</div>
<script>
const frames = FRAMES;
const show = () => {
  const frame = frames[document.getElementById("tau").value];
  document.getElementById("at").textContent = frame.tau.toFixed(2);
  for (const group of ["semantic", "texture"]) {
    document.getElementById(group).src = frame[group];
    document.getElementById("t_" + group).textContent = group + ", t = " + frame["t_" + group].toFixed(2);
  }
};
document.getElementById("tau").addEventListener("input", show);
show();
</script>
"""


def write_page(workdir: Path) -> None:
    """Write `report.html` from `report.md`, its pictures and `stages.npz`.

    Args:
      workdir: a finished demo's folder.
    """
    from markdown_it import MarkdownIt

    text = (workdir / "report.md").read_text()
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    if (workdir / "stages.npz").exists():  # which demos of earlier versions lack
        slider = _slider(workdir / "stages.npz")
        body = re.sub(r'<p><img src="stages.png"[^>]*></p>', lambda found: slider, body)
    inside = lambda found: f'src="{_data(workdir / found[1])}"'
    body = re.sub(r'src="([\w.]+\.png)"', inside, body)
    title = html.escape(text.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    write_text(
        workdir / "report.html", f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'
    )


def _slider(path: Path) -> str:
    """Return the slider over the stages that `results.py` saved."""
    with np.load(path) as stages:
        taus, t_semantic, t_texture = (stages[name].tolist() for name in ("taus", "t_semantic", "t_texture"))
        pictures = zip(stages["semantic"], stages["texture"], strict=True)
        frames = [
            dict(tau=tau, t_semantic=a, t_texture=b, semantic=_data(semantic), texture=_data(texture))
            for tau, a, b, (semantic, texture) in zip(taus, t_semantic, t_texture, pictures, strict=True)
        ]
    return _SLIDER.replace("LAST", str(len(frames) - 1)).replace("FRAMES", json.dumps(frames))


def _data(picture: Path | np.ndarray) -> str:
    """Return a PNG file, or an image uint8 (H, W, 3), as a data URI."""
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(buffer := io.BytesIO(), format="PNG")
    else:
        buffer = io.BytesIO(picture.read_bytes())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
