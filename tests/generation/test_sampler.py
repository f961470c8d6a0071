"""The sampler: sample i depends on (seed, i) alone; parts that do not fit each other are refused."""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest

from sfd_jax.diffusion.sample_config import SolverConfig
from sfd_jax.distributed import make_mesh
from sfd_jax.errors import SfdError
from sfd_jax.generation.sampler import SampleConfig, make_sampler, sample_noise
from sfd_jax.latents import LatentStatistics
from sfd_jax.models import Network

CLASSES = 5
EULER = SampleConfig(solver="euler", num_steps=5)


def random_checkpoint(name, config, seed, **metadata):
    """Return a checkpoint with all weights random: fresh networks end with zeros, so tests would prove nothing."""
    network = Network(name, config)
    leaves, tree = jax.tree.flatten(network.abstract_params())
    generator = np.random.default_rng(seed)
    leaves = [
        (generator.standard_normal(x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))).astype(np.float32) for x in leaves
    ]
    return jax.tree.unflatten(tree, leaves), {"network": name, "network_config": network.config_dict()} | metadata


def statistics(texture=3, semantic=2):
    return LatentStatistics(
        np.arange(texture) * 0.1, np.full(texture, 2.0), np.zeros(semantic), np.ones(semantic)
    ).to_dict()


@functools.cache
def dit(seed=0, width=16, **changes):
    config = dict(width=width, depth=1, num_heads=2, input_size=4, in_channels=5, num_classes=CLASSES) | changes
    names = [f"name {i}" for i in range(CLASSES)]
    return random_checkpoint("lightning_dit", config, seed, latent_statistics=statistics(), class_names=names, step=3)


@functools.cache
def vae(z_channels=3):
    config = dict(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=z_channels, norm_groups=2)
    return random_checkpoint("texture_vae", config, 9)


def labels_of(indices):
    return np.asarray(indices) * 3 % CLASSES


@pytest.fixture(scope="module")
def whole():
    """Thirteen samples in one batch on all eight devices."""
    sampler = make_sampler(dit(), vae(), EULER, seed=11)
    indices = np.arange(13)
    return sampler, *sampler(indices, labels_of(indices)), sampler.latents(indices, labels_of(indices))


def test_samples_are_images_and_differ(whole):
    sampler, images, nfe, _ = whole
    assert images.shape == (13, 8, 8, 3) and images.dtype == np.uint8 and sampler.image_size == 8
    assert images.std(axis=(1, 2, 3)).min() > 1  # not saturated, so that differences are visible
    assert len(np.unique(images.reshape(13, -1), axis=0)) == 13
    assert (nfe == 4).all()  # five points, four Euler steps


def test_given_noise_is_integrated_as_samples_are(whole):
    """`sfd verify` compares samples with the released code through `integrate`."""
    sampler, *_, latents = whole
    indices = np.arange(8)
    noise = sample_noise(11, indices.astype(np.uint32), (4, 4, 5))
    found, nfe = sampler.integrate(noise, labels_of(indices))
    np.testing.assert_allclose(found, latents[:8], rtol=1e-5, atol=1e-5)  # a batch of another size
    assert nfe == 4


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp", "batch_size"), [(1, 1, 4), (8, 4, 7)])
def test_batch_size_and_devices_change_nothing_but_rounding(whole, devices, fsdp, batch_size):
    _, images, _, latents = whole
    mesh = make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
    sampler = make_sampler(dit(), vae(), EULER, seed=11, mesh=mesh)
    indices = np.array([12, 0, 7, 5, 3])  # out of order and without neighbours
    if devices == 1:
        other = sampler.latents(indices, labels_of(indices), batch_size)
        # float32 sums in another order: a few units in the last place over a block and four steps.
        np.testing.assert_allclose(other, latents[indices], rtol=0, atol=2e-5 * np.abs(latents).max())
    else:
        changed = sampler(indices, labels_of(indices), batch_size)[0].astype(int) - images[indices]
        assert np.abs(changed).max() <= 1 and (changed != 0).mean() < 0.01  # truncation to bytes at an edge


def test_per_sample_error_control_makes_dopri5_independent_of_the_batch():
    config = SampleConfig(solver="dopri5", rtol=1e-2, atol=1e-3, guidance="cfg", guidance_scale=2.0)
    sampler = make_sampler(dit(), vae(), config, mesh=make_mesh(devices=jax.devices()[:1]))
    alone = sampler(np.array([2]), np.array([4]), 3)
    among = sampler(np.array([0, 2, 1]), np.array([1, 4, 2]), 3)
    assert alone[1][0] == among[1][1]  # as many evaluations
    assert np.abs(alone[0][0].astype(int) - among[0][1]).max() <= 1


def test_noise_is_a_function_of_seed_and_index():
    one = sample_noise(3, np.array([7], np.uint32), (2, 2, 5))
    many = sample_noise(3, np.arange(9, dtype=np.uint32), (2, 2, 5))
    np.testing.assert_array_equal(one[0], many[7])
    assert (np.asarray(many[7]) != np.asarray(sample_noise(4, np.array([7], np.uint32), (2, 2, 5))[0])).all()


def test_decoding_is_the_released_formula(whole):
    # Texture denormalised by the statistics, decoded, clamp(127.5 x + 128, 0, 255), truncated.
    _, images, _, latents = whole
    params, metadata = vae()
    network = Network("texture_vae", metadata["network_config"])
    raw = latents[..., :3] * 2.0 + np.arange(3) * 0.1
    decode = jax.jit(lambda params, raw: network.apply(params, raw, method="decode"))
    pixels = np.asarray(decode(params, raw.astype(np.float32)))
    expected = np.clip(127.5 * pixels + 128, 0, 255).astype(np.uint8).astype(int)
    difference = np.abs(expected - images)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # rounding at an edge of truncation


def test_autoguidance_vanishes_as_its_scale_nears_one(whole):
    *_, latents = whole
    indices, mesh = np.arange(8), make_mesh(devices=jax.devices()[:1])

    def change(scale, **groups):
        config = dataclasses.replace(EULER, guidance="autoguidance", guidance_scale=scale, **groups)
        sampler = make_sampler(dit(), vae(), config, weak=dit(seed=5, width=8), seed=11, mesh=mesh)
        return np.abs(sampler.latents(indices, labels_of(indices)) - latents[:8]).max(axis=(0, 1, 2))

    assert change(1.00001).max() < 1e-3  # 1 itself is refused
    assert change(3.0).min() > 0.1


def test_trajectory_ends_at_the_sample(whole):
    sampler, images, _, latents = whole
    taus = [0.0, 0.7, 1.3]
    path, pictures = sampler.trajectory(np.arange(3), labels_of(np.arange(3)), taus)
    assert path.shape == (3, 3, 4, 4, 5) and pictures.shape == (3, 3, 8, 8, 3)
    # Inside a larger program the last bit of a normal number may be rounded otherwise (seen with jax 0.12).
    np.testing.assert_array_max_ulp(path[0], sample_noise(11, np.arange(3, dtype=np.uint32), (4, 4, 5)), maxulp=2)
    # The stop at 0.7 shifts the points of Euler's grid, so the ends are near, not equal.
    assert np.abs(path[2] - latents[:3]).max() < 0.2 * np.abs(latents).max()


def test_an_sde_draws_each_step_by_seed_and_index():
    config = SampleConfig(
        solver="sde_euler", num_steps=5, diffusion="sigma", diffusion_semantic="constant", diffusion_norm_semantic=0.5
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    sampler = make_sampler(dit(), vae(), config, seed=11, mesh=mesh)
    assert sampler.recipe["sampler"]["diffusion_semantic"] == "constant"
    indices = np.array([12, 0, 7])
    latents = sampler.latents(indices, labels_of(indices), batch_size=2)
    assert np.isfinite(latents).all()
    alone = sampler.latents(indices[2:], labels_of(indices[2:]), batch_size=2)
    np.testing.assert_allclose(alone[0], latents[2], atol=2e-5 * np.abs(latents).max())
    least = 4 + 1  # four steps and the last one; stages that a short grid would skip have a step of their own
    assert least <= sampler(indices[:1], labels_of(indices[:1]), batch_size=2)[1][0] <= least + 3
    # The steps have noise of their own: from the same start, samples 0 and 1 end elsewhere.
    start = np.broadcast_to(sample_noise(11, np.zeros(1, np.uint32), (4, 4, 5)), (2, 4, 4, 5))
    ends, _ = sampler.integrate(start, np.zeros(2, int))
    assert np.abs(ends[0] - ends[1]).min(axis=(0, 1)).max() > 1e-3
    with pytest.raises(SfdError, match="probability flow"):
        sampler.trajectory(indices, labels_of(indices), [0.0, 1.3])


def test_likelihoods_belong_to_their_rows(whole):
    """That they are right is shown for Gaussians, tests/diffusion/test_transport.py."""
    sampler, _, _, latents = whole
    solver = SolverConfig(solver="euler", num_steps=5)
    together = sampler.log_likelihood(latents[:3], labels_of(np.arange(3)), solver=solver)
    alone = sampler.log_likelihood(latents[2:3], labels_of(np.array([2])), np.array([2]), solver)
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-5)
    assert np.isfinite(together).all() and len(set(together)) == 3
    with pytest.raises(SfdError, match=r"must be \(n, 4, 4, 5\)"):
        sampler.log_likelihood(latents[:3], labels_of(np.arange(2)))
    with pytest.raises(SfdError, match="probability flow"):
        sampler.log_likelihood(latents[:1], labels_of(np.arange(1)), solver=SolverConfig(solver="sde_heun"))


def test_both_programs_keep_all_weights(whole):
    # So that the memory XLA reports for each (`sfd compile_pod`) includes all weights on the device.
    weights = sum(np.size(x) * 4 for params, _ in (dit(), vae()) for x in jax.tree.leaves(params))
    sampling, decoding = whole[0].trace(16), whole[0].trace_decoding(16)
    assert [x.shape for x in sampling.out_info] == [(16, 4, 4, 5), (16,), (16,)]
    assert [x.shape for x in decoding.out_info] == [(16, 8, 8, 3), (16,)]
    given = [program.lower().compile().memory_analysis().argument_size_in_bytes for program in (sampling, decoding)]
    rows, seed = 2 * 4 * 16 // 8, 4  # indices and labels of two rows a device; one seed
    assert given == [weights + rows + seed, weights + 16 * 4 * 4 * 5 * 4]


def test_recipe_names_what_determines_the_images():
    first, second = make_sampler(dit(), vae(), EULER), make_sampler(dit(seed=1), vae(), EULER, seed=1)
    assert first.recipe["model"]["step"] == 3 and first.recipe["sampler"]["solver"] == "euler"
    assert first.recipe["model"]["hash"] != second.recipe["model"]["hash"]
    assert first.recipe["texture_vae"] == second.recipe["texture_vae"]
    assert first.recipe["seed"] != second.recipe["seed"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make_sampler(vae(), vae(), EULER), "holds 'texture_vae', expected 'lightning_dit'"),
        (
            lambda: make_sampler((dit()[0], dit()[1] | {"latent_statistics": None}), vae(), EULER),
            "no latent statistics",
        ),
        (lambda: make_sampler(dit(), vae(z_channels=4), EULER), "3 channels, the texture VAE 4"),
        (lambda: make_sampler(dit(in_channels=6), vae(), EULER), "5 channels .* the model 6"),
        (
            lambda: make_sampler(dit(), vae(), SampleConfig(guidance="autoguidance", guidance_scale=2.0)),
            "needs a weaker model",
        ),
        (lambda: make_sampler(dit(), vae(), EULER, weak=dit()), "no effect with guidance 'none'"),
        (
            lambda: make_sampler(dit(null_label=False), vae(), SampleConfig(guidance="cfg", guidance_scale=2.0)),
            "no null label",
        ),
        (lambda: SampleConfig(guidance="cgf"), "did you mean 'cfg'"),
        (lambda: SampleConfig(solver="dopri"), "dopri5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build, words):
    with pytest.raises(SfdError, match=words):
        build()


def test_labels_and_values_outside_their_range_are_refused():
    sampler = make_sampler(dit(), vae(), EULER, mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(SfdError, match=r"labels must be in 0\.\.4"):
        sampler(np.arange(2), np.array([0, 5]))
    params, metadata = copy.deepcopy(dit())
    params["final"]["linear"]["bias"] = np.full_like(params["final"]["linear"]["bias"], np.nan)
    with pytest.raises(SfdError, match="sample 3 is not finite"):
        make_sampler((params, metadata), vae(), EULER, mesh=sampler.mesh)(np.arange(3, 5), np.array([0, 1]))


def test_modulation_is_computed_once_per_sample_not_per_token():
    params, metadata = dit()
    network, batch = Network("lightning_dit", metadata["network_config"]), 3
    inputs = np.ones((batch, 4, 4, 5), np.float32), *np.full((2, batch), 0.5, np.float32), np.zeros(batch, np.int32)
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in equations(jax.make_jaxpr(network.apply)(params, *inputs).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    width = network.config.width
    # The products for the 6 D wide modulation (2 D in the final layer) and the clocks' D / 2.
    assert (batch, 6 * width) in shapes and (batch, 2 * width) in shapes and shapes.count((batch, width // 2)) == 4
    assert not [s for s in shapes if len(s) > 2 and s[-1] == 6 * width]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from equations(inner)


def test_few_steps_and_ordinary_solvers_of_one_model():
    few = SampleConfig(solver="few_step", nfe=1)
    model = dit(end_time=True)
    sampler, indices = make_sampler(model, vae(), few, seed=11), np.arange(8)
    latents, nfe = sampler.latents(indices, labels_of(indices)), sampler(indices, labels_of(indices))[1]
    noise, zeros = sample_noise(11, indices.astype(np.uint32), (4, 4, 5)), np.zeros(8, np.float32)
    network = Network("lightning_dit", model[1]["network_config"])
    step = jax.jit(network.apply)(model[0], noise, zeros, zeros, labels_of(indices), (zeros + 1, zeros + 1))
    np.testing.assert_allclose(latents, noise + step, rtol=1e-4, atol=1e-4)
    assert (nfe == 1).all()
    assert np.isfinite(make_sampler(model, vae(), EULER, seed=11).latents(indices, labels_of(indices))).all()
    with pytest.raises(SfdError, match="needs a model trained for it"):
        make_sampler(dit(), vae(), few)
    with pytest.raises(SfdError, match="number of its steps"):
        SampleConfig(solver="few_step")
    with pytest.raises(SfdError, match="has learned its teacher's"):
        SampleConfig(solver="few_step", nfe=4, guidance="cfg", guidance_scale=2.0)
