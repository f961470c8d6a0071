"""A web page on which a model makes images: `sfd app`.

The page computes in the process of the command, one request at a time; a queue of limited length holds the others.
What a request may ask for is bounded here, since anyone can send requests without the page.
"""

import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sfd_jax.class_names import short_names
from sfd_jax.data.latent_store import LatentStore
from sfd_jax.errors import SfdError, needs_extra
from sfd_jax.experiment.pipeline import Pipeline
from sfd_jax.experiment.stages import follow

if TYPE_CHECKING:
    import gradio

STAGES = 14  # pictures under the slider
SOLVERS = ("dopri5", "ab2", "heun", "euler")
NUMBERS = (1, 4, 8, 16)  # images at once: few choices, since each is compiled
MOST_NFE = 200
MOST_LATENT_BYTES = 2**30  # of a training set that neighbours are searched in
QUEUE = 16  # requests that wait; further ones are told to come later
MOST_REQUEST_BYTES = 100_000  # of one request; the page's own take a few hundred
SHOWN = 256  # pixels that small images are enlarged to at least


class Studio:
    """Make what the page shows; every public method takes values as the page, or anyone, sends them."""

    def __init__(self, pipeline: Pipeline, latents: LatentStore | None = None):
        """Keep a model and the training latents in which neighbours are searched.

        Args:
          pipeline: the model.
          latents: its training set; None shows no neighbours.

        Raises:
          SfdError: the training set is too large to search.
        """
        self.pipeline, self._latents, self._lock = pipeline, None, threading.Lock()
        if latents is not None:
            size = len(latents) * latents.read(np.arange(1))["texture"].astype(np.float32).nbytes
            if size > MOST_LATENT_BYTES:
                raise SfdError(
                    f"{len(latents):,} latents take {size / 2**30:.1f} GiB to search for neighbours; omit them"
                )
            self._latents = latents.statistics.normalise_texture(latents.read(np.arange(len(latents)))["texture"])

    @property
    def shows_neighbours(self) -> bool:
        """Whether there is a training set."""
        return self._latents is not None

    @property
    def guidances(self) -> list[str]:
        """The kinds of guidance that the model allows, its default first."""
        allowed = ["none", *(["cfg"] if self.pipeline.null_label else []), *(["autoguidance"] * self.pipeline.has_weak)]
        return sorted(allowed, key=lambda name: name != self.pipeline.settings["guidance"])

    def make(
        self, label: str, seed: float, num: int, guidance: str, scale: float, solver: str, nfe: float
    ) -> tuple[list[Image.Image], list[tuple[Image.Image, Image.Image]], list[tuple[Image.Image, str]], str, str]:
        """Make images.

        Args:
          label: name or number of a class.
          seed: of the noise, a whole number.
          num: one of NUMBERS.
          guidance, scale: its kind and scale.
          solver, nfe: one of SOLVERS, and its network evaluations where it takes a number.

        Returns:
          The images; the stages of the first one as (semantic, texture); the nearest training images with captions, []
          without a training set; a sentence about what they cost; and the recipe as JSON.

        Raises:
          SfdError: a value that is not allowed, in words for the page.
        """
        if not isinstance(label, str) or not label.strip():
            raise SfdError("type the name or the number of a class")
        if len(label) > 100:
            raise SfdError("that is too long for the name of a class")
        if num not in NUMBERS or solver not in SOLVERS or guidance not in self.guidances:
            raise SfdError("choose how many, the solver and the guidance from the lists")
        for name, value in (("seed", seed), ("scale", scale), ("network evaluations", nfe)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
                raise SfdError(f"the {name} must be a number")
        if seed != int(seed):
            raise SfdError("the seed must be a whole number")
        settings: dict[str, Any] = {"guidance": guidance, "solver": solver}
        if guidance != "none":
            settings["guidance_scale"] = float(scale)
        if solver != "dopri5":
            if not 1 <= nfe <= MOST_NFE:
                raise SfdError(f"give 1 to {MOST_NFE} network evaluations")
            settings["nfe"] = int(nfe)
        with self._lock:
            images = self.pipeline.generate(label.strip(), num, seed=int(seed), **settings)
            stages = self._stages(images.labels[0])
            near = self._neighbours(images.latents)
        used = "two networks" if guidance == "autoguidance" else "the network"
        cost = f"{images.nfe.mean():.0f} evaluations of {used} an image."
        pictures = [enlarged(image) for image in images]
        return pictures, stages, near, cost, json.dumps(images.recipe, indent=1)

    def _stages(self, label: int) -> list[tuple[Image.Image, Image.Image]]:
        try:
            stages = follow(self.pipeline.sampler, label, STAGES)
        except SfdError:  # too few steps for so many times
            return []
        pairs = zip(stages.semantic, stages.texture, strict=True)
        return [tuple(enlarged(Image.fromarray(each)) for each in pair) for pair in pairs]

    def _neighbours(self, latents: np.ndarray) -> list[tuple[Image.Image, str]]:
        """Return for each image the training image with the nearest texture latent, decoded."""
        if self._latents is None:
            return []
        sampler = self.pipeline.sampler
        made = sampler.layout.split(latents)[0]
        flat = self._latents.reshape(len(self._latents), -1)
        near, distances = [], []
        for one in made.reshape(len(made), -1):
            squares = np.mean((flat - one) ** 2, axis=1)
            near.append(int(np.argmin(squares)))
            distances.append(float(np.sqrt(squares.min())))
        pixels = sampler.decode(self._latents[near])
        return [
            (enlarged(Image.fromarray(image)), f"training image {index}, distance {distance:.2f}")
            for image, index, distance in zip(pixels, near, distances, strict=True)
        ]


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image enlarged to SHOWN pixels a side, without smoothing; larger ones as they are."""
    factor = -(-SHOWN // image.height)
    return (
        image if factor < 2 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )


def make_page(studio: Studio, title: str) -> "gradio.Blocks":
    """Lay out the page.

    Args:
      studio: makes what it shows.
      title: of the page.

    Raises:
      SfdError: Gradio is not installed.
    """
    with needs_extra("app", "the web page"):
        import gradio

    pipeline, settings = studio.pipeline, studio.pipeline.settings
    names = short_names(pipeline.class_names) if pipeline.class_names else [str(i) for i in range(pipeline.num_classes)]

    def make(*values):
        try:
            images, stages, near, cost, recipe = studio.make(*values)
        except SfdError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error  # stays until closed
        return images, stages, *show(stages, STAGES), STAGES - 1, near, cost, recipe

    def show(stages, at):
        if not stages or not isinstance(at, (int, float)):
            return None, None
        return stages[min(max(int(at), 0), len(stages) - 1)]

    # Without analytics and without fonts from another host: the page works without a connection.
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(f"# {title}\nA new choice of number, guidance or solver compiles first; a new seed does not.")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = gradio.Dropdown(
                    names, value=names[0], label="Class: type a name or number", allow_custom_value=True
                )
                seed = gradio.Number(0, label="Seed", precision=0)
                num = gradio.Radio(list(NUMBERS), value=NUMBERS[1], label="Images")
                guidance = gradio.Radio(studio.guidances, value=studio.guidances[0], label="Guidance")
                scale = gradio.Slider(1, 5, settings["guidance_scale"], step=0.1, label="Guidance scale")
                solver = gradio.Dropdown(list(SOLVERS), value=SOLVERS[0], label="Solver")
                nfe = gradio.Slider(4, 100, 16, step=1, label="Network evaluations (not of dopri5)")
                button = gradio.Button("Make images", variant="primary", elem_id="make")
            with gradio.Column(scale=2):
                images = gradio.Gallery(label="Images", format="png", columns=4, height="auto", elem_id="images")
                cost = gradio.Markdown(elem_id="cost")
                stages = gradio.State([], time_to_live=3600)
                at = gradio.Slider(
                    0, STAGES - 1, STAGES - 1, step=1, label="Time: semantics lead, texture follows", elem_id="time"
                )
                with gradio.Row():
                    semantic = gradio.Image(label="Semantic latent of the first image", format="png")
                    texture = gradio.Image(label="Its texture, decoded", format="png", elem_id="texture")
                near = gradio.Gallery(
                    label="Nearest training images",
                    format="png",
                    columns=4,
                    height="auto",
                    visible=studio.shows_neighbours,
                    elem_id="near",
                )
                recipe = gradio.Code(language="json", label="Recipe", max_lines=12)
        inputs = [label, seed, num, guidance, scale, solver, nfe]
        outputs = [images, stages, semantic, texture, at, near, cost, recipe]
        button.click(make, inputs, outputs, concurrency_limit=1, api_name=False)
        at.input(show, [stages, at], [semantic, texture], queue=False, api_name=False)
    return page.queue(max_size=QUEUE)


class SmallRequests:
    """ASGI middleware that hangs up on a request of more than MOST_REQUEST_BYTES; Gradio would keep all of it."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope, receive, send):
        received = 0

        async def receive_little():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= MOST_REQUEST_BYTES else {"type": "http.disconnect"}

        await self._app(scope, receive_little if scope["type"] == "http" else receive, send)


def serve(page: "gradio.Blocks", host: str, port: int) -> None:
    """Serve a page in the background.

    Args:
      page: from `make_page`.
      host: address to listen at.
      port: port to listen at.

    Raises:
      SfdError: the port is taken, or the address is not of this machine.
    """
    import gradio
    from starlette.middleware import Middleware

    # Visitors' states and requests are bounded, and nothing on the page takes a file.
    bounds = dict(max_threads=8, state_session_capacity=50, max_file_size=1, ssr_mode=False)
    bounds["app_kwargs"] = {"middleware": [Middleware(SmallRequests)]}
    # Fonts are the system's, so that the page works without a connection.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["gradio", "settings"],
            theme=theme,
            **bounds,
        )
    except OSError as error:
        raise SfdError(f"cannot listen at {host}:{port} ({error}); choose another --port") from error
