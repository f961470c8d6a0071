"""From images to batches: image sources, the latent store, extraction, and the loader.

    images.py        one interface to folders, tars, TFDS, the digits and MNIST; the ADM centre crop
    extract.py       images -> latent shards, with an encode function that the caller brings
    latent_store.py  our shards: random access, manifest, statistics
    released.py      the released safetensors shards, read as they are
    paired.py        latents with the pixels they were made from
    pipeline.py      batches as a function of (seed, step, host)

A source is anything with `len(source)` and `source[i] -> dict`. A new one need not be registered:
pass it to `make_batches` or `extract`.
"""
