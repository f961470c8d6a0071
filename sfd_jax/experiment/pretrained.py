"""A model in one folder that loads on any machine, and its way to and from the Hugging Face hub.

    config.json            which parts there are, each with the metadata of its checkpoint; default sampling settings
    model.safetensors      float32 parameters by their paths, such as network/blocks/0/...
    texture_vae.safetensors, weak.safetensors
    README.md              model card: settings, scores, licence, usage

The bytes depend on parameters and metadata alone: not on devices, times or folders of the machine that wrote them.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util

from sfd_jax.class_names import class_names_of
from sfd_jax.convert.safetensors_files import read_safetensors
from sfd_jax.errors import SfdError
from sfd_jax.files import disk_fault, write_json, write_text
from sfd_jax.generation.parts import Checkpoint
from sfd_jax.models import network_of
from sfd_jax.models.fingerprint import params_hash
from sfd_jax.trees import named_leaves

FORMAT = "sfd_jax pipeline 1"
CONFIG, CARD = "config.json", "README.md"
PARTS = ("model", "texture_vae", "weak")
_SHOWN = ("guidance", "guidance_scale", "solver", "num_steps", "nfe", "mode")


def is_pretrained(folder: str | os.PathLike) -> bool:
    """Return whether a folder is one that `save_parts` wrote."""
    try:
        return json.loads((Path(folder) / CONFIG).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def save_parts(folder: str | os.PathLike, parts: Mapping[str, Checkpoint], sample: dict, card: str) -> Path:
    """Write parts of a pipeline to a new folder.

    Args:
      folder: must not exist, or be empty.
      parts: (params, metadata) by name: "model", "texture_vae", maybe "weak".
      sample: default sampling settings.
      card: text of the model card.

    Returns:
      The folder.

    Raises:
      SfdError: the folder holds something.
      OSError: as the disk raises it; nothing is left in the folder's place.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SfdError(f"'{folder}' exists and is not an empty folder; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not there at all: the folder gets its name at the end.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        part = Path(scratch) / folder.name
        part.mkdir()
        for name, (params, _) in parts.items():
            arrays = {path: np.ascontiguousarray(leaf) for path, leaf in sorted(named_leaves(params).items())}
            save_file(arrays, part / f"{name}.safetensors", {"format": FORMAT})
            (part / f"{name}.safetensors").chmod(0o644)  # the library makes it readable for its owner alone
        about = {name: _portable(part) for name, part in parts.items()}
        write_json(part / CONFIG, {"format": FORMAT, "parts": about, "sample": sample})
        write_text(part / CARD, card)
        part.replace(folder)  # an empty folder is replaced
    return folder


def load_parts(folder: str | os.PathLike) -> tuple[dict[str, Checkpoint], dict]:
    """Read what `save_parts` wrote.

    Returns:
      (params, metadata) by name, and the default sampling settings.

    Raises:
      SfdError: a file is missing or damaged.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    if not isinstance(config.get("parts"), dict) or not {"model", "texture_vae"} <= config["parts"].keys():
        raise SfdError(f"'{folder / CONFIG}' does not name the parts model and texture_vae; download it again")
    parts = {}
    for name, metadata in config["parts"].items():
        arrays = {path: array.load() for path, array in read_safetensors(folder / f"{name}.safetensors").items()}
        params = traverse_util.unflatten_dict(arrays, sep="/")
        if (found := params_hash(params)) != metadata["params_hash"]:
            raise SfdError(
                f"'{folder / name}.safetensors' is not the file that {CONFIG} was written with "
                f"(hash {found[:12]}, expected {metadata['params_hash'][:12]}); download both again"
            )
        parts[name] = params, metadata
    return parts, config.get("sample") or {}


def download(name: str) -> Path:
    """Download a folder of `save_parts` from the hub to the hub's own cache, or find it there.

    Args:
      name: OWNER/NAME of a repository, with @REVISION behind it where not the newest is wanted.

    Raises:
      SfdError: no such repository, no connection, or it holds something else.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[CONFIG, CARD, *(f"{part}.safetensors" for part in PARTS)],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except Exception as error:  # of httpx, huggingface_hub, json, ssl
        if disk_fault(error):
            raise
        raise SfdError(
            f"'{name}' is no folder, and was not found on the hub ({str(error).strip().splitlines()[0]:.300}). Private "
            "and gated repositories need HF_TOKEN"
        ) from error
    if not is_pretrained(folder):
        raise SfdError(f"'{name}' was not saved by Pipeline.save_pretrained; `sfd convert` reads other checkpoints")
    return Path(folder)


def upload(folder: Path, repository: str, private: bool | None, message: str) -> str:
    """Upload a folder of `save_parts` to the hub as a new commit; make the repository if there is none.

    Returns:
      The commit's address.

    Raises:
      SfdError: no connection, or no right to write there.
    """
    from huggingface_hub import HfApi

    api = HfApi(os.environ.get("HF_ENDPOINT"))
    try:
        if not api.repo_exists(repository):  # create_repo(exist_ok=True) hides why it was refused
            api.create_repo(repository, private=private)
        return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url
    except Exception as error:  # of httpx, huggingface_hub, json, ssl
        raise SfdError(
            f"'{repository}' could not be written ({str(error).strip().splitlines()[0]:.300}). Log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write there"
        ) from error


def read_scores(path: str | os.PathLike, model: Checkpoint) -> dict:
    """Read the report of `sfd evaluate` on samples of a model.

    Args:
      path: file of `sfd evaluate --out`.
      model: that the samples must be of, where the report says of which they are.

    Raises:
      SfdError: the file is missing, something else, or of another model.
    """
    try:
        report = json.loads(Path(path).read_text())
        {name: float(value) for name, value in report["scores"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SfdError(f"scores='{path}' is not a file of `sfd evaluate --out` ({error})") from error
    made_by = ((report.get("recipe") or {}).get("sampling") or {}).get("model") or {}
    if made_by.get("hash") not in (None, own := params_hash(model[0])):
        raise SfdError(
            f"scores='{path}' are of samples of another model (hash {made_by['hash'][:12]}, this one {own[:12]}): "
            "evaluate this one's"
        )
    return report


def model_card(parts: Mapping[str, Checkpoint], settings: dict, licence: str, scores: dict | None) -> str:
    """Return the text of a model card in the hub's form.

    Args:
      parts, settings: as in `save_parts`.
      licence: the hub's identifier, such as "mit".
      scores: a report of `sfd evaluate`, or None.
    """
    model, metadata = parts["model"]
    network, config = metadata["network_config"], metadata.get("config") or {}
    size = network["input_size"] * network_of(parts["texture_vae"][1], "texture_vae").config.downsampling
    names = class_names_of(metadata, network["num_classes"])[0] or []
    clocks = dict(config.get("clocks") or {})
    clock = " ".join([clocks.pop("name", ""), *(f"{name}={value}" for name, value in clocks.items())])
    batch = (config.get("train") or {}).get("global_batch_size")
    each = f" of {batch} images" if batch else ""
    rows = {
        "images": f"{size} x {size} px of {network['num_classes']} classes"
        + (f": {', '.join(names[:10])}" if names else "")
        + (", ..." if len(names) > 10 else ""),
        "parameters": f"{sum(np.size(x) for x in named_leaves(model).values()):,}",
        "training": f"{metadata.get('step') or 0:,} steps{each}; {metadata.get('source', '')}",
        "clocks": clock,
        "settings": ", ".join(f"{name} {settings[name]}" for name in _SHOWN if settings.get(name) is not None),
        **{f"hash of {name}": params_hash(params)[:16] for name, (params, _) in parts.items()},
    }
    lines = [
        "---",
        "library_name: sfd_jax",
        f"license: {licence}",
        "tags: [image-generation, class-conditional, diffusion, semantic-first-diffusion, jax]",
        "---",
        "",
        "# A Semantic-First Diffusion model",
        "",
        "It denoises a semantic and a texture latent of an image on two clocks "
        "([arXiv 2512.04926](https://arxiv.org/abs/2512.04926)). With sfd_jax:",
        "",
        "```python",
        "from sfd_jax import Pipeline",
        "",
        'pipeline = Pipeline.from_pretrained("OWNER/NAME")',
        f'pipeline.generate("{names[0] if names else 0}")[0].save("image.png")',
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items() if value),
        "",
    ]
    if scores:
        values = (f"| {name} | {value:.6g} |" for name, value in scores["scores"].items())
        about = json.dumps({name: value for name, value in scores.items() if name != "scores"}, indent=1)
        lines += ["## Scores", "", "| score | value |", "|---|---|", *values, ""]
        lines += ["All that determines them, as `sfd evaluate` says:", "", "```json", about, "```", ""]
    return "\n".join(lines)


def _portable(checkpoint: Checkpoint) -> dict:
    """Return metadata with a hash of the parameters, without what belongs to the machine that trained them."""
    params, metadata = checkpoint
    config = {group: value for group, value in (metadata.get("config") or {}).items() if group != "mesh"}
    if "data" in config:  # numbers tell the image size, texts are paths
        config["data"] = {name: value for name, value in config["data"].items() if isinstance(value, (int, float))}
    kept = {key: value for key, value in metadata.items() if key not in ("given_as", "foreign", "init")}
    kept |= {"config": config, "params_hash": params_hash(params)}
    return json.loads(json.dumps(kept, sort_keys=True))
