"""A hash of a set of training data, independent of its location."""

import hashlib
from typing import Any

import numpy as np

_RECORDS = 16  # records that are read where a source does not know the hash of its files


def data_hash(source: Any) -> str:
    """Return a hex digest of a source: its size, its class names and its content.

    A latent store's manifest has the hashes of its shards. Of other sources evenly spread records are read, images as
    encoded bytes, so that the decoder's version does not change the hash.

    Args:
      source: of images, latents or both (`WithPixels`), with `len` and `class_names`.
    """
    digest = hashlib.sha256(repr((len(source), getattr(source, "class_names", None))).encode())
    if hasattr(source, "latents"):
        digest.update((data_hash(source.latents) + data_hash(source.images)).encode())
    elif hasattr(source, "manifest"):
        digest.update("".join(shard["sha256"] for shard in source.shards).encode())
    else:
        records = getattr(source, "dataset", source)
        for index in np.unique(np.linspace(0, len(source) - 1, _RECORDS).round().astype(int)).tolist():
            record = records[index]
            for part in (record[name] for name in sorted(record)) if isinstance(record, dict) else record:
                digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
