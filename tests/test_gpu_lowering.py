"""What runs on an NVIDIA card is lowered for one without one: attention by cuDNN, and float32 products in float32."""

import re
import types

import jax
import numpy as np
import pytest

from sfd_jax.diffusion.clocks import FixedOffset
from sfd_jax.diffusion.losses import LossConfig
from sfd_jax.distributed import make_mesh
from sfd_jax.execution import choose_execution
from sfd_jax.generation import SampleConfig
from sfd_jax.latents import LatentLayout
from sfd_jax.models import Network, dit_config
from sfd_jax.pod import programs
from sfd_jax.training import OptimizerConfig, TrainConfig
from sfd_jax.training.diffusion import diffusion_task

LAYOUT, CLOCKS = LatentLayout(32, 16), FixedOffset(0.3)
H100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
GPU = types.SimpleNamespace(devices=np.array([H100]), size=1, shape={"data": 1, "fsdp": 1})


def lowered(traced: jax.stages.Traced) -> str:
    """Lower for CUDA; every product of two float32 arrays must ask for float32, where a GPU would take TF32."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    types_of = lambda line: re.findall(r"tensor<[^>]*x(\w+)>", line.rsplit(" : ", 1)[1])[:2]
    of_float32 = [line for line in products if "f32" in types_of(line)]
    assert of_float32 and not [line for line in of_float32 if line.count("HIGHEST") != 2]
    return text


@pytest.mark.slow
def test_training_and_sampling_take_cudnn_in_bfloat16(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # else cuDNN itself is asked
    for module in ("sfd_jax.training.step", "sfd_jax.generation.sampler"):
        monkeypatch.setattr(f"{module}.choose_execution", lambda mesh, **options: choose_execution(GPU, **options))
    mesh, calls = make_mesh(devices=jax.devices()[:1]), {}
    for dtype in ("bfloat16", "float32"):
        # XL but for its depth: 16 heads of width 72.
        network = Network("lightning_dit", dit_config("XL", depth=1, compute_dtype=dtype, repa_features=0))
        task = diffusion_task(network, LAYOUT, CLOCKS, LossConfig(repa_weight=0.0))
        config = TrainConfig(OptimizerConfig(), global_batch_size=64, remat="auto")
        batch = programs.training_batch(network, 64, repa_source="semvae", image_size=256)
        calls[dtype] = re.findall(r"@__cudnn\$\w+", lowered(programs.trace_training(task, config, mesh, batch)))
        if dtype == "bfloat16":
            guided = SampleConfig(guidance="autoguidance", guidance_scale=1.5)
            weak = Network("lightning_dit", dit_config("B", depth=1, compute_dtype=dtype))
            sampling = programs.trace_sampling(network, weak, LAYOUT, CLOCKS, guided, mesh, 64)
            assert set(re.findall(r"@__cudnn\$\w+", lowered(sampling))) == {"@__cudnn$fmhaSoftmax"}
    assert calls == {"bfloat16": ["@__cudnn$fmhaSoftmax", "@__cudnn$fmhaSoftmaxBackward"], "float32": []}


def test_inception_multiplies_in_float32():
    lowered(programs.trace_inception(make_mesh(devices=jax.devices()[:1]), 2, 256))
