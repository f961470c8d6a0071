"""The demo's pictures: samples by class, samples and their nearest images, one image emerging, the losses.

Every function takes arrays and writes one PNG; matplotlib is imported only here, and needs no display.
"""

from pathlib import Path

import numpy as np

from sfd_jax.errors import needs_extra
from sfd_jax.files import atomic_write


def _pyplot():
    with needs_extra("demo", "drawing pictures"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=100, facecolor="white")
    _pyplot().close(figure)


MOST_ROWS = 20  # classes shown


def draw_samples(
    path: Path,
    samples: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    class_names: list[str],
    columns: int = 12,
) -> None:
    """Draw a row of samples per class, with a real image of the class at the left.

    Args:
      path: PNG to write.
      samples: (N, H, W, 3) uint8.
      labels: (N,) int.
      real: (M, H, W, 3) uint8, of every class; the first of each is shown.
      real_labels: (M,) int.
      class_names: by label.
      columns: samples per row.
    """
    classes = np.unique(labels)[:MOST_ROWS]
    _, height, width, _ = samples.shape
    gap = 3
    canvas = np.full((len(classes) * (height + gap) + gap, (columns + 1) * (width + gap) + 5 * gap, 3), 255, np.uint8)
    for row, label in enumerate(classes):
        top = gap + row * (height + gap)
        tiles = [real[real_labels == label][0], *samples[labels == label][:columns]]
        for column, tile in enumerate(tiles):
            left = gap + column * (width + gap) + (4 * gap if column else 0)
            canvas[top : top + height, left : left + width] = tile
    names = [_short(class_names[label]) for label in classes]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(canvas.shape[1] / 60, canvas.shape[0] / 60 + 0.5))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([gap + row * (height + gap) + height / 2 for row in range(len(classes))], names)
    axes.set_xticks([gap + width / 2, canvas.shape[1] / 2 + width / 2], ["real", "samples"])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def _short(name: str, most: int = 18) -> str:
    """Return a class name shortened for a picture; a dollar sign would start a formula."""
    return (name if len(name) <= most else name[: most - 3] + "...").replace("$", r"\$")


def draw_neighbours(
    path: Path, samples: np.ndarray, nearest: np.ndarray, distances: np.ndarray, columns: int = 8
) -> None:
    """Draw samples, each above its nearest training image, with their distance.

    Args:
      path: PNG to write.
      samples, nearest: (N, H, W, 3) uint8.
      distances: (N,).
      columns: pairs per row.
    """
    pyplot, rows = _pyplot(), -(-len(samples) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.1 * columns + 0.5, 2.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    height, width = samples.shape[1:3]
    gap = np.full((max(2, height // 16), width, 3), 255, np.uint8)
    for axis, sample, real, distance in zip(axes.flat, samples, nearest, distances, strict=False):  # some stay empty
        axis.imshow(np.concatenate([sample, gap, real]), interpolation="nearest")
        axis.set_xlabel(f"{distance:.3f}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("nearest training image | sample", fontsize=7)
    figure.tight_layout()
    _save(figure, path)


def semantic_colours(semantic_latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Map semantic latents to colours by the three principal axes of a reference set.

    Args:
      semantic_latents: (B, H, W, C) float.
      reference: (M, H, W, C) float: clean semantic latents that fix axes and range, so that colours
        mean the same at every tau.

    Returns:
      (B, H, W, 3) float in [0, 1].
    """
    flat = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
    axes = axes[:3]
    projected = (flat - mean) @ axes.T
    low, high = np.percentile(projected, [2, 98], axis=0)
    values = (semantic_latents.astype(np.float64) - mean) @ axes.T
    return np.clip((values - low) / (high - low), 0, 1)


def draw_stages(
    path: Path,
    taus: np.ndarray,
    t_semantic: np.ndarray,
    t_texture: np.ndarray,
    semantic: np.ndarray,
    decoded: np.ndarray,
    title: str,
) -> None:
    """Draw how one image emerges: semantic latent as colours above, decoded texture below, tau to the right.

    Args:
      path: PNG to write.
      taus, t_semantic, t_texture: (T,) global time and the two clocks.
      semantic: (T, h, w, 3) uint8.
      decoded: (T, H, W, 3) uint8.
      title: what is shown.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, len(taus), figsize=(1.25 * len(taus) + 0.6, 3.5), squeeze=False)
    for column in range(len(taus)):
        top, bottom = axes[:, column]
        top.imshow(semantic[column], interpolation="nearest")
        bottom.imshow(decoded[column], interpolation="nearest")
        top.set_title(f"tau {taus[column]:.2f}", fontsize=9)
        top.set_xlabel(f"t_sem {t_semantic[column]:.2f}", fontsize=8)
        bottom.set_xlabel(f"t_tex {t_texture[column]:.2f}", fontsize=8)
        for axis in (top, bottom):
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_ylabel("semantics", fontsize=9)
    axes[1, 0].set_ylabel("texture, decoded", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def draw_losses(path: Path, curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """Draw the loss curves of every stage, one panel each.

    Args:
      path: PNG to write.
      curves: stage -> name -> (steps (T,), values (T,)).
    """
    pyplot = _pyplot()
    rows, columns = -(-len(curves) // 3), 3  # legible on the page of the report
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 3.0 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (stage, lines) in zip(axes.flat, curves.items(), strict=False):
        positive = all(np.all(values > 0) for _, values in lines.values())
        for name, (steps, values) in lines.items():
            axis.plot(steps, values, label=name, linewidth=1.2)
        axis.set_yscale("log" if positive else "linear")
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)
