"""References for samples: an ADM reference batch, a statistics file, or images."""

import dataclasses
from pathlib import Path

from sfd_jax.errors import SfdError
from sfd_jax.evaluation.features import Extractor
from sfd_jax.evaluation.image_sets import ImageSet, hash_files, open_image_set
from sfd_jax.evaluation.npz import npz_names
from sfd_jax.evaluation.statistics import FeatureStatistics, load_statistics


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference with `statistics`, `images` or both.

    Attributes:
      name: its path.
      statistics: stored with it; they are used instead of computing them.
      images: its images.
      hash: hex digest of the files.
      notes: assumptions about it.
    """

    name: str
    statistics: FeatureStatistics | None
    images: ImageSet | None
    hash: str
    notes: tuple[str, ...] = ()

    def for_extractor(self, extractor: Extractor) -> "Reference":
        """Return this reference for an extractor, without statistics of another one.

        Raises:
          SfdError: the statistics are of another extractor, and there are no images.
        """
        if self.statistics is None or self.statistics.extractor == extractor.name:
            return self
        if self.images is None:
            self.statistics.check_extractor(extractor.name, extractor.hash, self.name)
        return dataclasses.replace(self, statistics=None, notes=())


def open_reference(path: str | Path, image_size: int | None = None) -> Reference:
    """Open a reference.

    Args:
      path: an ADM reference batch (npz with `arr_0`, and `mu`, `sigma`, `mu_s`, `sigma_s` that are used
        when present); a statistics file of `sfd evaluate --save_statistics`, or of another tool with `mu` and
        `sigma` (pytorch-fid, clean-fid), assumed to be of Inception; an npz or a folder of images.
      image_size: crop the image files of a folder to squares of this size.

    Raises:
      SfdError: it is missing or damaged, or an npz with neither images nor statistics.
    """
    path = Path(path)
    if path.is_dir():
        images = open_image_set(path, image_size)
        return Reference(str(path), None, images, images.hash())
    if not path.is_file():
        raise SfdError(
            f"no reference {path}: give an ADM npz, a statistics file of `sfd evaluate --save_statistics`, or a "
            "folder of images"
        )
    names = npz_names(path)
    statistics = load_statistics(path) if "mu" in names else None
    images = open_image_set(path) if "arr_0" in names else None
    if statistics is None and images is None:
        raise SfdError(
            f"{path} is not a reference: expected `arr_0` (uint8 images) or `mu` and `sigma`, found "
            f"{', '.join(names[:10]) or 'no arrays'}"
        )
    notes = ()
    if images is None and "extractor" not in names:
        notes = (
            f"{path} does not say which network its statistics are of; they are assumed to be of Inception on images "
            "resized as in the ADM suite (another tool's resize changes FID by tenths)",
        )
    return Reference(str(path), statistics, images, hash_files([path]), notes)
