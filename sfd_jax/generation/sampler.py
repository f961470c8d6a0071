"""From checkpoints to a function that makes images: (indices, labels) -> uint8, over all devices.

Two programs: one integrates the whole ODE or SDE, one decodes its texture. A single program takes the TPU compiler a
third longer than both (docs/performance.md), and only latents pass between them.

Sample i starts from noise that depends on (seed, i) alone, as does the noise in each step of an SDE. Staged integration
controls the error of each sample separately: batch size, padding, devices and hosts change nothing but float rounding.
(In `released` mode dopri5 has one step size for the batch, as released, so the batch size matters there.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sfd_jax.class_names import class_names_of
from sfd_jax.diffusion import guidance
from sfd_jax.diffusion.clocks import Clocks, clocks_config, split_params
from sfd_jax.diffusion.few_step import sample_few_step, step_ends
from sfd_jax.diffusion.likelihood import log_likelihood, rademacher_by_row
from sfd_jax.diffusion.paths import LinearPath, Path
from sfd_jax.diffusion.predictions import (
    PredictionType,
    VelocityPrediction,
    describe_transport,
    transport_of,
    velocity_from,
)
from sfd_jax.diffusion.sample_config import FEW_STEP, SampleConfig, SolverConfig
from sfd_jax.diffusion.sampling import sample, trajectory
from sfd_jax.diffusion.sde import evaluations, noise_by_step, sample_sde
from sfd_jax.distributed import batch_sharding, make_mesh, param_shardings, put_same, replicated
from sfd_jax.errors import SfdError
from sfd_jax.execution import choose_execution
from sfd_jax.generation.parts import Checkpoint, check_parts, clocks_of, trained_labels
from sfd_jax.latents import LatentLayout, LatentStatistics
from sfd_jax.models import Network, kernels, network_of
from sfd_jax.models.execution import executing
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.models.network import checkpoint_name
from sfd_jax.models.texture_vae import to_bytes
from sfd_jax.randomness import normal_by_row
from sfd_jax.ranges import check
from sfd_jax.settings import defaults_of

# Images per device that are decoded at once: the decoder's widest layers take a hundred times the latent's memory.
DECODE_AT_ONCE = 8
_DTYPES = (np.uint32, np.int32)  # of indices and labels on the device


class Sampler:
    """Make images; `make_sampler` builds a sampler.

    Attributes:
      num_classes, class_names: of the model; the names are None if the checkpoint has none.
      labels: the labels that can be sampled, sorted: those that were trained.
      image_size: side of the images, in pixels.
      clocks: with their trained parameters.
      layout: which channels of the latents are texture, which semantic.
      seed: of the noise; can be set, which compiles nothing.
      recipe: JSON-able description of all that determines the images except labels, with "notes", the assumptions
        made.
    """

    def __init__(
        self,
        model: tuple[Network, dict],
        texture_vae: tuple[Network, dict],
        *,
        layout: LatentLayout,
        statistics: LatentStatistics,
        clocks: Clocks,
        config: SampleConfig = SampleConfig(),
        weak: tuple[Network, dict] | None = None,
        path: Path = LinearPath(),
        predictions: Mapping[str, PredictionType] = MappingProxyType({}),
        seed: int = 0,
        class_names: list[str] | None = None,
        labels: np.ndarray | None = None,
        recipe: dict | None = None,
        scan_blocks: bool | None = None,
        fused_attention: bool = True,
        mesh: Mesh | None = None,
    ):
        """Place parameters on the mesh.

        Args:
          model, texture_vae, weak: (network, params); `weak` is AutoGuidance's. With shapes instead of params, the
            sampler can only be traced.
          layout, statistics, clocks: those the model was trained with; clocks with their trained parameters.
          config: how to sample.
          path, predictions: the path they were trained on, and what "model" and "weak" predict; velocity by default.
          seed: of the noise.
          class_names: names of the classes.
          labels: those that were trained, sorted; all of them by default.
          recipe: entries for `self.recipe`, which has `seed` too.
          scan_blocks: run the models' blocks as one compiled loop, or unrolled; None: the best for the devices.
          fused_attention: attend by a fused kernel where the devices have one that is faster.
          mesh: the devices; all of them by default.

        Raises:
          SfdError: the parts do not fit each other.
        """
        check(seed=seed)
        self.mesh = make_mesh() if mesh is None else mesh
        self._execution = choose_execution(self.mesh, scan=scan_blocks, fused_attention=fused_attention)
        network, vae = model[0], texture_vae[0]
        _check_fit(network, vae, weak and weak[0], layout, statistics, config)
        self.num_classes, self.class_names = network.config.num_classes, class_names
        self.labels = np.arange(self.num_classes) if labels is None else labels
        self.image_size = network.config.input_size * vae.config.downsampling
        self._recipe, self.seed = recipe or {}, seed
        self._networks = {"model": network, "vae": vae} | ({"weak": weak[0]} if weak else {})
        params = {"model": model[1], "vae": texture_vae[1]} | ({"weak": weak[1]} if weak else {})
        self._params = put_same(params, param_shardings(params, self.mesh))
        self.layout, self._statistics, self.clocks = layout, statistics, clocks
        self._config, self._path = config, path
        self._predictions = {"model": VelocityPrediction(), "weak": VelocityPrediction(), **predictions}
        # Every host gets all rows: the host that writes needs them, and they are small compared with the work.
        # Both programs keep unused weights, so the memory that XLA reports includes all that the device holds.
        options = {"out_shardings": replicated(self.mesh), "keep_unused": True}
        self._run_sample, self._run_decode = jax.jit(self._sample, **options), jax.jit(self._decode, **options)
        self._run_integrate = jax.jit(self._integrate, **options)
        self._run_follow = jax.jit(self._follow, static_argnums=4, **options)

    @property
    def recipe(self) -> dict:
        return {**self._recipe, "seed": self.seed}

    def __call__(
        self, indices: np.ndarray, labels: np.ndarray, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make the samples of some indices.

        Args:
          indices: (n,) ints in [0, 2^32 - 1).
          labels: (n,) ints in [0, num_classes).
          batch_size: samples computed at once over all devices; all n by default.

        Returns:
          images uint8 (n, H, W, 3), and the network evaluations that each sample needed, (n,) int32.

        Raises:
          SfdError: a sample is not finite, or a label is not one of `labels`.
        """
        return self.with_latents(indices, labels, batch_size)[1:]

    def with_latents(
        self, indices: np.ndarray, labels: np.ndarray, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the normalised latents (n, H, W, C) float32 and what `__call__` returns; arguments are the same."""
        indices, labels = np.asarray(indices), np.asarray(labels)
        if indices.shape != labels.shape or indices.ndim != 1 or not len(indices):
            raise SfdError(f"indices {indices.shape} and labels {labels.shape} must be (n,) both, n > 0")
        rows = []
        for count, *batch in self._batches(indices, labels, batch_size):
            latents, batch_nfe, converged = self._run_sample(self._params, self._seed, *batch)
            made, finite = self._run_decode(self._params, latents)
            *made, converged, finite = (np.asarray(x)[:count] for x in (latents, made, batch_nfe, converged, finite))
            fine = np.logical_and(converged, finite)
            if not fine.all():
                raise SfdError(
                    f"sample {int(np.asarray(batch[0])[:count][~fine][0])} is not finite: the solver did not "
                    "converge or the weights are damaged; try a smaller guidance scale or float32"
                )
            rows.append(made)
        latents, images, nfe = map(np.concatenate, zip(*rows, strict=True))
        return latents, images, nfe

    def use(self, params: dict | None) -> None:
        """Sample with other weights of the model's network from now on; compiles nothing.

        Args:
          params: of the same shapes, placed on the mesh as a run's are; None releases the present ones.
        """
        self._params = {**self._params, "model": params}

    def latents(self, indices: np.ndarray, labels: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Return the normalised composite latents (n, H, W, C) float32 that `__call__` would decode."""
        batches = self._batches(np.asarray(indices), np.asarray(labels), batch_size)
        run = lambda *batch: np.asarray(self._run_sample(self._params, self._seed, *batch)[0])
        return np.concatenate([run(*batch)[:count] for count, *batch in batches])

    def decode(self, texture: np.ndarray) -> np.ndarray:
        """Decode normalised texture latents (n, H, W, C) float32 to images uint8 (n, H*f, W*f, 3)."""
        count = len(texture)
        latents = np.zeros((-(-count // self.mesh.size) * self.mesh.size, *self._latent_shape), np.float32)
        latents[:count] = self.layout.join(texture, np.zeros((*texture.shape[:3], self.layout.semantic_channels)))
        return np.asarray(self._run_decode(self._params, put_same(latents, replicated(self.mesh)))[0])[:count]

    def integrate(self, noise: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
        """Integrate from given noise with the program that makes samples, to compare with other code.

        Args:
          noise: (n, H, W, C) float32, n a multiple of the devices.
          labels: (n,) ints.

        Returns:
          latents (n, H, W, C) float32, normalised, and the network evaluations of the whole batch. The steps of an SDE
          have the noise of samples 0 to n - 1.
        """
        indices = np.arange(len(labels), dtype=np.uint32)
        batch = (np.asarray(noise, np.float32), indices, np.asarray(labels, np.int32))
        batch = put_same(batch, batch_sharding(self.mesh))
        latents, nfe, _ = self._run_integrate(self._params, self._seed, *batch)
        return np.asarray(latents), int(np.max(nfe))

    def trajectory(
        self, indices: np.ndarray, labels: np.ndarray, taus: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return samples at several times between noise and image.

        Args:
          indices, labels: (n,) each.
          taus: T increasing global times in [0, tau_end].

        Returns:
          latents (T, n, H, W, C) float32, normalised, and the images decoded from them, uint8 (T, n, H, W, 3).
        """
        count, *batch = next(self._batches(np.asarray(indices), np.asarray(labels), None))

        latents, images = self._run_follow(self._params, self._seed, *batch, tuple(map(float, taus)))
        return np.asarray(latents)[:, :count], np.asarray(images)[:, :count]

    def log_likelihood(
        self,
        latents: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray | None = None,
        solver: SolverConfig = SolverConfig(),
    ) -> np.ndarray:
        """Estimate the log density of latents under the model's probability flow, guidance included.

        Args:
          latents: (n, H, W, C) float32, normalised.
          labels: (n,) ints.
          indices: (n,) ints; the probe of each row depends on (seed, index). 0 to n - 1 by default; the mean over
            several calls with other indices has less variance.
          solver: method and tolerances of the ODE.

        Returns:
          (n,) float32, in nats.

        Raises:
          SfdError: shapes or labels do not fit, or `solver` is not an ODE solver in staged mode.
        """
        labels, indices = np.asarray(labels), np.arange(len(labels)) if indices is None else np.asarray(indices)
        if np.shape(latents) != (len(labels), *self._latent_shape) or len(indices) != len(labels):
            raise SfdError(
                f"latents {np.shape(latents)}, labels {labels.shape} and indices {indices.shape} must be "
                f"(n, {', '.join(map(str, self._latent_shape))}), (n,) and (n,)"
            )
        count, indices, rows = next(self._batches(indices, labels, None))
        padding = ((0, len(rows) - count), (0, 0), (0, 0), (0, 0))
        latents = put_same(np.pad(np.float32(latents), padding, mode="edge"), batch_sharding(self.mesh))

        def estimate(params, latents, indices, labels):
            probe = rademacher_by_row(jax.random.key(self.seed), indices, self._latent_shape)
            problem = dict(layout=self.layout, clocks=self.clocks, solver=solver)
            # Fused kernels have no derivative forwards.
            plain = dataclasses.replace(self._execution, attention=kernels.tuned_attention)
            return log_likelihood(self._velocity_fn(params, labels, plain), latents, probe, **problem)

        estimate = jax.jit(estimate, out_shardings=replicated(self.mesh))
        return np.asarray(estimate(self._params, latents, indices, rows)[0])[:count]

    def trace(self, batch_size: int) -> jax.stages.Traced:
        """Trace the program that samples latents, to compile it for devices that this machine need not have.

        Args:
          batch_size: samples over all devices, a multiple of the number of devices.
        """
        rows = (jax.ShapeDtypeStruct((batch_size,), kind, sharding=batch_sharding(self.mesh)) for kind in _DTYPES)
        return self._run_sample.trace(self._params, self._seed, *rows)

    def trace_decoding(self, batch_size: int) -> jax.stages.Traced:
        """Trace the program that decodes the latents, as `trace` does."""
        shape = (batch_size, *self._latent_shape)
        latents = jax.ShapeDtypeStruct(shape, np.float32, sharding=replicated(self.mesh))
        return self._run_decode.trace(self._params, latents)

    @property
    def _seed(self) -> np.uint32:
        """The seed as an argument of the programs: in Python's type it would be compiled into them."""
        return np.uint32(self.seed)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        size = self._networks["model"].config.input_size
        return size, size, self.layout.channels

    def _batches(self, indices, labels, batch_size):
        """Yield (count, indices, labels) on the devices in batches of one size, the last padded with its last row."""
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise SfdError(f"labels must be in 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}")
        if (strange := labels[~np.isin(labels, self.labels)]).size:
            known = f"{self.labels[0]}..{self.labels[-1]}"
            raise SfdError(f"class {strange[0]} was not trained; give one of {known}")
        size = -(-(batch_size or len(indices)) // self.mesh.size) * self.mesh.size
        for start in range(0, len(indices), size):
            rows = slice(start, start + size)
            count = len(indices[rows])
            padded = (np.pad(x[rows], (0, size - count), mode="edge") for x in (indices, labels))
            yield (
                count,
                *(put_same(x.astype(kind), batch_sharding(self.mesh)) for x, kind in zip(padded, _DTYPES, strict=True)),
            )

    def _sample(self, params, seed, indices, labels):
        """Return latents (B, H, W, C), and each sample's network evaluations and whether it converged, both (B,)."""
        return self._integrate(params, seed, sample_noise(seed, indices, self._latent_shape), indices, labels)

    def _follow(self, params, seed, indices, labels, taus):
        problem = self._problem(params, sample_noise(seed, indices, self._latent_shape), labels)
        latents = trajectory(problem.pop("velocity_fn"), problem.pop("noise"), taus, **problem)
        return latents, jax.lax.map(lambda one: self._decode(params, one)[0], latents)

    def _integrate(self, params, seed, noise, indices, labels):
        if sde := self._config.sde:
            equation = {"clocks": self.clocks, "path": self._path, "config": sde}
            equation["first_t"] = self._predictions["model"].interval(self._path)[0]
            noises = noise_by_step(step_key(seed), indices, self._latent_shape)
            velocity_fn = self._velocity_fn(params, labels)
            latents = sample_sde(velocity_fn, noise, noises, layout=self.layout, **equation)
            converged = jnp.isfinite(latents).all(axis=(1, 2, 3))
            return latents, jnp.full(len(labels), evaluations(**equation), jnp.int32), converged
        if self._config.solver == FEW_STEP:
            taus = step_ends(self.clocks, self._config.nfe)
            apply = self._apply(params, "model")
            network = lambda latents, *times_and_ends: apply(latents, *times_and_ends[:2], labels, times_and_ends[2])
            latents = sample_few_step(network, noise, taus, clocks=self.clocks, layout=self.layout)
            converged = jnp.isfinite(latents).all(axis=(1, 2, 3))
            return latents, jnp.full(len(labels), len(taus) - 1, jnp.int32), converged
        latents, stats = sample(**self._problem(params, noise, labels))
        return latents, jnp.sum(stats.sample_nfe, axis=1), stats.converged

    def _problem(self, params, noise, labels) -> dict:
        """Return the arguments of `diffusion.sample`."""
        config = self._config
        jumps = (
            ()
            if config.guidance == "none"
            else guidance.jumps(
                self.clocks,
                interval_start=config.guidance_interval_start,
                interval_groups=config.guidance_interval_groups,
            )
        )
        return {
            "velocity_fn": self._velocity_fn(params, labels),
            "noise": noise,
            "layout": self.layout,
            "clocks": self.clocks,
            "solver": config,
            "jumps": jumps,
        }

    def _apply(self, params, name, execution=None):
        def output(*args):
            with executing(execution or self._execution):
                return self._networks[name].apply(params[name], *args)

        return output

    def _velocity_fn(self, params, labels, execution=None):
        def network(name):
            apply = self._apply(params, name, execution)
            return velocity_from(apply, self._predictions[name], self._path, self.layout)

        config = self._config
        interval = dict(
            layout=self.layout,
            interval_start=config.guidance_interval_start,
            interval_groups=config.guidance_interval_groups,
        )
        if config.guidance == "cfg":
            return guidance.classifier_free(
                network("model"),
                labels,
                null_label=self.num_classes,
                scale=config.guidance_scale,
                **interval,
            )
        if config.guidance == "autoguidance":
            return guidance.autoguidance(
                network("model"),
                network("weak"),
                labels,
                scale=config.guidance_scale,
                scale_semantic=config.guidance_scale_semantic,
                scale_texture=config.guidance_scale_texture,
                **interval,
            )
        return guidance.conditional(network("model"), labels)

    def _decode(self, params, latents):
        """Return bytes (B, H, W, 3) and whether each image is finite, (B,)."""
        vae, statistics, layout = self._networks["vae"], self._statistics, self.layout

        def decode_one(params, one):
            raw = statistics.denormalise_texture(layout.split(one)[0])
            pixels = vae.apply(params, raw[None], method="decode")[0]
            return to_bytes(pixels), jnp.isfinite(pixels).all()

        def on_device(params, latents):
            return jax.lax.map(lambda one: decode_one(params, one), latents, batch_size=DECODE_AT_ONCE)

        rows = PartitionSpec(self.mesh.axis_names)
        return jax.shard_map(
            on_device, mesh=self.mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
        )(params["vae"], latents)


def sample_noise(seed: int, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal noise (B, *shape) float32; each row depends on (seed, index) alone."""
    return normal_by_row(jax.random.key(seed), indices, shape)


def step_key(seed: int) -> jax.Array:
    """Return the key of the noise in the steps of an SDE: that of an index which no sample has."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))


def make_sampler(
    model: Checkpoint,
    texture_vae: Checkpoint,
    config: SampleConfig = SampleConfig(),
    *,
    weak: Checkpoint | None = None,
    seed: int = 0,
    clocks: Clocks | None = None,
    statistics: LatentStatistics | None = None,
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
    other_texture_vae: bool = False,
) -> Sampler:
    """Build a sampler from checkpoints.

    Args:
      model, texture_vae: (params, metadata) as `load_params` returns.
      config: how to sample.
      weak: AutoGuidance's weaker model.
      seed: of the noise.
      clocks: to replace the checkpoint's; see `clocks_of` for checkpoints without clocks.
      statistics: of the training latents; only needed if the checkpoint has none.
      compute_dtype: "float32" or "bfloat16", instead of the checkpoint's.
      mesh: the devices; all of them by default.
      other_texture_vae: allow a texture VAE that did not make the model's latents, e.g. one with a finetuned decoder.

    Raises:
      SfdError: a checkpoint is of another network or lacks latent statistics, or they do not belong together.
    """
    networks = {
        "model": network_of(model[1], "lightning_dit", compute_dtype=compute_dtype),
        "weak": weak and network_of(weak[1], "lightning_dit", compute_dtype=compute_dtype),
        "texture_vae": network_of(texture_vae[1], "texture_vae"),
    }
    metadata = model[1]
    if metadata.get("latent_statistics"):
        own = LatentStatistics.from_dict(metadata["latent_statistics"])
        if statistics is not None and not own.same_scale(statistics):
            raise SfdError(
                f"{checkpoint_name(metadata)} has other latent statistics ({own.hash()[:12]}) than those given "
                f"({statistics.hash()[:12]}): it was trained on other latents. Leave out --latent_store"
            )
        statistics = own
    if statistics is None:
        raise SfdError(
            f"{checkpoint_name(metadata)} has no latent statistics, without which its latents cannot be decoded; "
            "give its training latents with --latent_store (statistics are never recomputed)"
        )
    training = metadata.get("config") or {}
    dropout, computed = (training.get("loss") or {}).get("label_dropout"), training.get("model") or {}
    if config.guidance == "cfg" and dropout == 0:
        raise SfdError(
            f"guidance 'cfg' needs label dropout in training, but {checkpoint_name(metadata)} was trained with 0"
        )
    layout = LatentLayout(len(statistics.texture_mean), len(statistics.semantic_mean))
    params, trained = split_params(model[0])
    if clocks is None:
        clocks = clocks_of(metadata).bind(trained)
    parts = {"model": model, "weak": weak, "texture_vae": texture_vae}
    described = {name: _describe(part) for name, part in parts.items() if part}
    hashes = {name: part["hash"] for name, part in described.items()}
    models = {"model": model} | ({"weak": weak} if weak else {})
    transports = {name: transport_of(part[1].get("config") or {}) for name, part in models.items()}
    paths = {name: transport["path"] for name, transport in transports.items()}
    if len(set(paths.values())) > 1:
        raise SfdError(f"model and weak model were trained on different paths: {paths['model']} and {paths['weak']}")
    compared = weak if config.guidance == "autoguidance" else None  # otherwise `Sampler` refuses an unused weak model
    image_size = networks["model"].config.input_size * networks["texture_vae"].config.downsampling
    notes = check_parts(model, texture_vae, compared, hashes, statistics, image_size, other_texture_vae)
    class_names, assumed = class_names_of(metadata, networks["model"].config.num_classes)
    recipe = {
        "model": described["model"],
        **({"few_step": metadata["few_step"]} if metadata.get("few_step") else {}),
        "weak_model": described.get("weak"),
        "texture_vae": described["texture_vae"],
        "latent_statistics": statistics.hash(),
        "clocks": clocks_config(clocks),
        **describe_transport(**transports["model"]),
        "sampler": {name: getattr(config, name) for name in defaults_of(SampleConfig)},
        "dtype": networks["model"].config.compute_dtype,
        "notes": notes + assumed,
    }
    return Sampler(
        (networks["model"], params),
        (networks["texture_vae"], texture_vae[0]),
        weak=weak and (networks["weak"], split_params(weak[0])[0]),
        layout=layout,
        statistics=statistics,
        clocks=clocks,
        config=config,
        path=paths["model"],
        predictions={name: transport["prediction"] for name, transport in transports.items()},
        seed=seed,
        class_names=class_names,
        labels=trained_labels(metadata, networks["model"].config.num_classes),
        recipe=recipe,
        scan_blocks=computed.get("scan_blocks"),
        fused_attention=computed.get("fused_attention", True),
        mesh=mesh,
    )


def _describe(checkpoint: Checkpoint) -> dict:
    params, metadata = checkpoint
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    return {
        "hash": None if abstract else params_hash(params),
        **{name: metadata.get(name) for name in ("step", "source", "which")},
    }


def _check_fit(network, vae, weak, layout, statistics, config) -> None:
    channels, texture = network.config.in_channels, vae.config.z_channels
    if layout.channels != channels:
        raise SfdError(
            f"latent statistics have {layout.channels} channels ({layout.texture_channels} texture, "
            f"{layout.semantic_channels} semantic), the model {channels}; they belong to another model"
        )
    if layout.texture_channels != texture or len(statistics.texture_mean) != texture:
        raise SfdError(
            f"the model's texture latents have {layout.texture_channels} channels, the texture VAE {texture}; give "
            "the texture VAE that made them"
        )
    if config.solver == FEW_STEP and not network.config.end_time:
        raise SfdError(
            "solver 'few_step' needs a model trained for it (configs/sfd.py:SIZE,few_step): give one, or another solver"
        )
    if config.guidance == "autoguidance":
        if weak is None:
            raise SfdError("guidance 'autoguidance' needs a weaker model; give one, or choose 'cfg' or 'none'")
        for field in ("in_channels", "input_size", "num_classes", "two_clocks"):
            ours, theirs = getattr(network.config, field), getattr(weak.config, field)
            if ours != theirs:
                raise SfdError(
                    f"the weak model has {field} {theirs}, the model {ours}; give a weak model with {field} {ours}"
                )
    elif weak is not None:
        raise SfdError(
            f"a weak model has no effect with guidance '{config.guidance}'; choose 'autoguidance' or leave it out"
        )
    if config.guidance == "cfg" and not network.config.null_label:
        raise SfdError("guidance 'cfg' needs a model trained with label dropout; this one has no null label")
