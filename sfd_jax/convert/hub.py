"""Download released files by huggingface_hub: resumed, checked and cached.

Listings, retries, tokens and progress bars are the library's. Its `http_get` also fetches files outside of the hub
and resumes in the middle of a file, which pooch cannot. `hf_hub_download` is not used, since it discards a partial
file when the command ends. A download goes to `NAME.part` and gets its name only when complete and checked, so a
file under its own name can be trusted, also one that was copied there by hand. PyTorch's releases have the beginning
of the SHA-256 in the file's name.

Environment: SFD_CACHE (default ~/.cache/sfd_jax), HF_TOKEN, HF_ENDPOINT (another server in the hub's layout),
SFD_MIRROR (a server that has the other files under the paths of their addresses).
"""

import contextlib
import dataclasses
import fnmatch
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sfd_jax.convert.file_kinds import NPZ, kind_of
from sfd_jax.errors import SfdError, nearest
from sfd_jax.files import disk_fault, file_sha256


@dataclasses.dataclass(frozen=True)
class Source:
    """The address of a released file.

    Args:
      where: a hub repository "owner/name", or the folder of a URL (with "://").
      files: pattern of the file's path there (`fnmatch`, * crosses slashes); a URL has no
        listing, so there it is the path itself.
      about: a line for the user.
      prefer: where `files` fits several files, take the last by name that fits this pattern too.
      count: number of files.
      converts: it is a checkpoint that `sfd convert` reads.
      beside: names of files next to it that are fetched too, if present.
      gated: its repository requires accepting a licence.
    """

    where: str
    files: str
    about: str
    prefer: str = "*"
    count: int = 1
    converts: bool = True
    beside: tuple[str, ...] = ()
    gated: bool = False

    @property
    def on_hub(self) -> bool:
        """Tell whether it is a repository of the hub."""
        return "://" not in self.where


def _transformers(where: str, about: str, gated: bool = False) -> Source:
    """Return the source of a network that transformers stores, under either name of its weights."""
    return Source(where, "*model.[sb]*", about, prefer="model.safetensors", beside=("config.json",), gated=gated)


def _diffusers(where: str, about: str) -> Source:
    """Return the source of a network that diffusers stores, under either name of its weights."""
    files = "diffusion_pytorch_model.[sb]*"
    return Source(where, files, about, prefer="diffusion_pytorch_model.safetensors", beside=("config.json",))


def _adm(size: str, file: str) -> Source:
    """Return the source of the reference batch of the ADM suite for images of `size` pixels."""
    folder = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{size}"
    return Source(folder, file, f"reference statistics of ImageNet {size} (ADM)", converts=False)


CATALOGUE = {
    "sfd_xl": Source(
        "SFD-Project/SFD",
        "model_weights/sfd_xl/*.pt",
        "LightningDiT-XL, 80 epochs (0400000.pt) and 800 (4000000.pt)",
        prefer="*4000000.pt",
    ),
    "sfd_1p0": Source(
        "SFD-Project/SFD",
        "model_weights/sfd_1p0/*.pt",
        "LightningDiT-1p0B (XXL), 80 epochs (0400000.pt) and 800 (4000000.pt)",
        prefer="*4000000.pt",
    ),
    "sfd_autoguidance_b": Source(
        "SFD-Project/SFD",
        "model_weights/sfd_autoguidance_b/*.pt",
        "weaker models for AutoGuidance: 70k steps for XL, 60k and 120k for 1p0B",
        prefer="*0070000.pt",
    ),
    "semantic_vae": Source("SFD-Project/SFD", "semantic_vae/*.pt*", "Semantic VAE, 768 to 16 channels"),
    "latent_stats": Source(
        "SFD-Project/SFD",
        "imagenet1k-latents/*stats.pt",
        "mean and std of texture and semantic latents",
        count=2,
        converts=False,
    ),
    "texture_vae": Source(
        "hustvl/va-vae-imagenet256-experimental-variants",
        "ldm-imagenet256-f16d32-50ep.ckpt",
        "texture VAE f16d32",
    ),
    "vavae": Source(
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        "vavae-imagenet256-f16d32-dinov2.pt",
        "VA-VAE, a texture VAE f16d32 aligned with DINOv2",
    ),
    "sd_vae_ft_ema": _diffusers("stabilityai/sd-vae-ft-ema", "Stability's texture VAE f8, that of DiT and SiT"),
    "sd_vae_ft_mse": _diffusers("stabilityai/sd-vae-ft-mse", "the same, its decoder trained further: smoother"),
    "dinov2_vitb14_reg": _transformers("facebook/dinov2-with-registers-base", "DINOv2 ViT-B/14 with registers"),
    "dinov3_s": _transformers("facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 ViT-S/16, gated", gated=True),
    "dinov3": _transformers("facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3 ViT-B/16, gated", gated=True),
    "dinov3_l": _transformers("facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 ViT-L/16, gated", gated=True),
    "siglip2": _transformers("google/siglip2-base-patch16-256", "SigLIP 2 ViT-B/16, 256 px"),
    "clip": _transformers("openai/clip-vit-base-patch16", "CLIP ViT-B/16"),
    "mae": _transformers("facebook/vit-mae-base", "MAE ViT-B/16"),
    "inception": Source(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth",
        "the FID Inception network",
    ),
    "adm_reference_256": _adm("256", "VIRTUAL_imagenet256_labeled.npz"),
    "adm_reference_512": _adm("512", "VIRTUAL_imagenet512.npz"),
}


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to download; size and sha256 (or its beginning) where known."""

    url: str
    name: str
    on_hub: bool = False
    size: int | None = None
    sha256: str | None = None


def cache_dir() -> Path:
    """Return the folder of downloads and converted checkpoints."""
    return Path(os.environ.get("SFD_CACHE") or Path.home() / ".cache" / "sfd_jax")


def fetch(name: str, file: str | None = None) -> list[Path]:
    """Return the local files of a catalogue entry, downloading what is missing.

    Args:
      name: a key of CATALOGUE.
      file: which file, where an entry has several (a name, or a part of one).

    Raises:
      SfdError: unknown name, nothing fits, a wrong size or checksum, or the server cannot be reached: then
        the message says which file to copy where by hand.
    """
    if name not in CATALOGUE:
        raise SfdError(f"nothing named '{name}' to fetch; {nearest(name, CATALOGUE)}")
    source = CATALOGUE[name]
    folder = cache_dir() / "downloads" / name
    basename = PurePosixPath(source.files).name
    here = {path.name: path for path in folder.glob(basename) if path.suffix != ".part"}
    found = _choose(source, here, file)
    complete = all((folder / name).exists() for name in source.beside)
    if found and complete and (file or source.count > 1 or fnmatch.fnmatch(found[0].name, source.prefer)):
        for path in found:
            if wrong := _wrong_download(path, path.name):
                raise SfdError(f"'{path}' is {wrong}; remove it and run the same command again")
        print(f"{name}: found {', '.join(map(str, found))}")
        return found
    from huggingface_hub.utils import logging

    logging.disable_propagation()  # it prints its warnings itself; the root handler would repeat them
    try:
        remote = {item.name: item for item in _listing(source)}
        beside = [remote.pop(name) for name in source.beside if name in remote]
        chosen = _choose(source, remote, file)
        if not chosen:
            raise SfdError(f"{name} has no file '{file}'; it has {', '.join(sorted(remote))}")
        return [_download(item, folder) for item in [*chosen, *beside]]
    except _Unreachable as error:
        if found:
            print(f"{name}: {error}; using {found[0]}")
            return found
        gated = " The repository is gated: accept its licence on its page and set HF_TOKEN to a token of that account."
        path = _wanted_path(source, file)
        what = f"{path} of {source.where}" if "*" in path else _url(source, path)
        what += "".join(f" and {name} beside it" for name in source.beside)
        names = " and ".join((PurePosixPath(path).name, *source.beside))
        raise SfdError(
            f"{name}: {error}.{gated * source.gated} What was downloaded is kept: repeat the command to resume. "
            f"Without a connection: fetch {what} on another machine, put {names} into {folder} and repeat the command"
        ) from error


def _wanted_path(source: Source, file: str | None) -> str:
    """Return the path of the file that is wanted, or a pattern of it where only the hub's listing can tell."""
    pattern = PurePosixPath(source.files)
    name = file or source.prefer.strip("*")
    if not file and source.prefer and "*" not in source.prefer:
        return str(pattern.with_name(source.prefer))
    return str(pattern.with_name(name)) if "*" in pattern.name and name.endswith(pattern.suffix) else source.files


def _choose(source: Source, files: dict, wanted: str | None) -> list:
    """Choose files by name: the wanted one, or all of an entry of several, or the preferred; [] where none fits."""
    names = sorted(files)
    if wanted is not None:
        names = [name for name in names if wanted in name]
    elif source.count > 1:
        return [files[name] for name in names] if len(names) >= source.count else []
    else:
        names = [name for name in names if fnmatch.fnmatch(name, source.prefer)] or names
    return [files[names[-1]]] if names else []


def _listing(source: Source) -> list[RemoteFile]:
    """List the hub's files that fit; a URL outside of the hub is its only file."""
    if not source.on_hub:
        digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", source.files)
        return [RemoteFile(_url(source, source.files), source.files, sha256=digits and digits[1])]
    from huggingface_hub import HfApi, RepoFile

    folder = source.files.split("*")[0].rpartition("/")[0]
    with _faults(source.where):
        entries = list(HfApi(_endpoint()).list_repo_tree(source.where, folder or None, recursive=True))
    found = [
        RemoteFile(_url(source, entry.path), PurePosixPath(entry.path).name, True, entry.size, sha256)
        for entry in entries
        if isinstance(entry, RepoFile) and (fnmatch.fnmatch(entry.path, source.files) or entry.path in source.beside)
        for sha256 in [entry.lfs and entry.lfs.sha256]
    ]
    if not {item.name for item in found} - {*source.beside}:
        raise SfdError(f"{source.where} no longer holds {source.files}; look for the file there by hand")
    return found


def _download(remote: RemoteFile, folder: Path) -> Path:
    """Download one file, resuming an earlier attempt, and check it."""
    target = folder / remote.name
    if target.exists():
        print(f"{target} exists")
        return target
    # The hash is in the name, so that the rest of another version is not appended.
    part = folder / f"{remote.name}.{(remote.sha256 or str(remote.size))[:8]}.part"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{remote.url} -> {target}")
    if remote.size is not None and part.exists() and part.stat().st_size > remote.size:
        part.unlink()
    fault = None
    try:
        _download_rest(remote, part)
    except _Unreachable as error:
        fault = error
    if fault and not part.stat().st_size:
        part.unlink()
        raise fault
    if wrong := _wrong_download(part, remote.name):  # by content, whatever the server or a login portal claims
        part.unlink()
        raise SfdError(f"{remote.url}: the download is {wrong}, and was removed; run the same command again") from fault
    if fault:
        raise fault
    if remote.sha256 and not (digest := file_sha256(part)).startswith(remote.sha256):
        part.unlink()
        raise SfdError(
            f"{remote.url}: its SHA-256 is {digest}, expected {remote.sha256}; it was damaged on the way or replaced "
            "on the server, and was removed; run the same command again"
        )
    part.rename(target)
    return target


def _download_rest(remote: RemoteFile, part: Path) -> None:
    """Append what is missing to `part`."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() if remote.on_hub else {}  # the token is only for the hub
    about = {"headers": headers, "expected_size": remote.size, "displayed_filename": remote.name}
    with part.open("ab") as sink, _faults(remote.url):
        try:
            http_get(remote.url, sink, resume_size=sink.tell(), **about)
        except HfHubHTTPError as error:
            if error.response.status_code != 416:
                raise
            sink.truncate(0)  # the server's file is not longer than the part, so the part is of another file
            sink.seek(0)
            http_get(remote.url, sink, **about)


def _wrong_download(path: Path, name: str) -> str:
    """Return the kind of a file that is not what its name says (a web page, a pointer, empty); else ""."""
    kind = kind_of(path)
    wanted = kind.what.startswith(NPZ) and name.endswith(".npz")
    wanted |= kind.what.startswith("text that begins with '{") and name.endswith(".json")
    return kind.what if kind.advice and not wanted else ""


class _Unreachable(Exception):
    """The server cannot be reached, lacks the file, or stops in the middle."""


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turn the library's exceptions into `_Unreachable`, except for a full disk."""
    try:
        yield
    except Exception as error:  # of httpx, huggingface_hub, json, ssl
        if disk_fault(error):
            raise
        raise _Unreachable(f"{where} could not be fetched ({str(error).strip() or type(error).__name__})") from error


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")  # read at each call; the library reads it only at its import


def _url(source: Source, path: str) -> str:
    if source.on_hub:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(source.where, path, endpoint=_endpoint())
    where = source.where
    if mirror := os.environ.get("SFD_MIRROR"):
        where = mirror.rstrip("/") + urllib.parse.urlsplit(where).path
    return f"{where}/{path}"
