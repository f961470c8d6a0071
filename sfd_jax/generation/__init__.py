"""From checkpoints to N images: labels, a sampler over all devices, and a job that can be resumed.

    sampler = make_sampler(load_params("xl"), load_params("texture_vae"))
    images, nfe = sampler(np.arange(8), make_labels("otter", 8, sampler.num_classes, sampler.class_names))

Sample i depends on (seed, i) and its label alone. Images are uint8 (N, H, W, 3).
"""

from sfd_jax.diffusion.clocks import Clocks
from sfd_jax.diffusion.sample_config import SampleConfig, SampleJob
from sfd_jax.generation.job import make_images
from sfd_jax.generation.labels import balanced_labels, make_labels, parse_classes, random_labels
from sfd_jax.generation.outputs import draw_grid, write_grid, write_pngs, write_samples_npz
from sfd_jax.generation.sampler import Sampler, make_sampler, sample_noise

__all__ = [
    "Clocks",
    "SampleConfig",
    "SampleJob",
    "Sampler",
    "balanced_labels",
    "draw_grid",
    "make_images",
    "make_labels",
    "make_sampler",
    "parse_classes",
    "random_labels",
    "sample_noise",
    "write_grid",
    "write_pngs",
    "write_samples_npz",
]
