"""The demo's report as one HTML file: pictures inside, and a slider over the stages of an image; needs no network."""

import html
import re
from pathlib import Path

import numpy as np

from sfd_jax.experiment.stages import Stages, data_uri
from sfd_jax.files import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; }
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
        with np.load(workdir / "stages.npz") as arrays:
            slider = Stages(**arrays).html()
        body = re.sub(r'<p><img src="stages.png"[^>]*></p>', lambda found: slider, body)
    inside = lambda found: f'src="{data_uri((workdir / found[1]).read_bytes())}"'
    body = re.sub(r'src="([\w.]+\.png)"', inside, body)
    title = html.escape(text.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'
    write_text(workdir / "report.html", page)
