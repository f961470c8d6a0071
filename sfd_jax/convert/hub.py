"""Where released files live, and how they get here: by huggingface_hub, resumed, checked, cached.

Listings, retries, tokens and progress bars are the library's, and its `http_get` fetches what lies outside of the hub
too: it goes on in the middle of a file, which pooch cannot. `hf_hub_download` is not used, since it throws away what
came when the command ends. A download goes to `NAME.part` and takes its name only when complete and checked, so a
file under its own name can be trusted, also one that was put there by hand. PyTorch's releases carry the beginning
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
    """Say where a released file lives.

    Args:
      where: a hub repository "owner/name", or the folder of an address (with "://").
      files: pattern of the file's path there (`fnmatch`, * crosses slashes); an address has no
        listing, so there it is the path itself.
      about: a line for the user.
      prefer: where the pattern fits several files, pick the last by name that fits this one too.
      count: how many files it is.
      converts: it is a checkpoint that `sfd convert` knows.
    """

    where: str
    files: str
    about: str
    prefer: str = "*"
    count: int = 1
    converts: bool = True

    @property
    def on_hub(self) -> bool:
        """Whether it is a repository of the hub."""
        return "://" not in self.where


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
    "dinov2_vitb14_reg": Source(
        "facebook/dinov2-with-registers-base", "model.safetensors", "DINOv2 ViT-B/14 with registers"
    ),
    "inception": Source(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth",
        "the FID Inception network",
    ),
    "adm_reference_256": Source(
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256",
        "VIRTUAL_imagenet256_labeled.npz",
        "reference statistics of ImageNet 256 (ADM)",
        converts=False,
    ),
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
    """Return the local files of a catalogue entry, downloading what is not there.

    Args:
      name: a key of CATALOGUE.
      file: which file, where an entry has several (a name, or a part of one).

    Raises:
      SfdError: unknown name, nothing fits, a wrong size or sum, or the server cannot be reached: then
        the message says what to put where by hand.
    """
    if name not in CATALOGUE:
        raise SfdError(f"nothing named '{name}' to fetch; {nearest(name, CATALOGUE)}")
    source = CATALOGUE[name]
    folder = cache_dir() / "downloads" / name
    basename = PurePosixPath(source.files).name
    here = {path.name: path for path in folder.glob(basename) if path.suffix != ".part"}
    found = _choose(source, here, file)
    if found and (file or source.count > 1 or fnmatch.fnmatch(found[0].name, source.prefer)):
        for path in found:
            if wrong := _wrong_download(path, path.name):
                raise SfdError(f"'{path}' is {wrong}; remove it and run the same command again")
        print(f"{name}: found {', '.join(map(str, found))}")
        return found
    try:
        remote = {item.name: item for item in _listing(source)}
        chosen = _choose(source, remote, file)
        if not chosen:
            raise SfdError(f"{name} has no file '{file}'; it has {', '.join(sorted(remote))}")
        return [_download(item, folder) for item in chosen]
    except _Unreachable as error:
        if found:
            print(f"{name}: {error}; taking {found[0]}")
            return found
        path = _wanted_path(source, file)
        what = f"{path} of {source.where}" if "*" in path else _url(source, path)
        raise SfdError(
            f"{name}: {error}. What came is kept: run the same command again to go on. Without a connection: fetch "
            f"{what} on another machine, put {PurePosixPath(path).name} into {folder} and run the same command again"
        ) from error


def _wanted_path(source: Source, file: str | None) -> str:
    """Return the path of the file that is wanted, or a pattern of it where only the hub's listing can tell."""
    pattern = PurePosixPath(source.files)
    name = file or source.prefer.strip("*")
    return str(pattern.with_name(name)) if "*" in pattern.name and name.endswith(pattern.suffix) else source.files


def _choose(source: Source, files: dict, wanted: str | None) -> list:
    """Pick from files by name: the one asked for, or all, or the preferred; [] where none fits."""
    names = sorted(files)
    if wanted is not None:
        names = [name for name in names if wanted in name]
    elif source.count > 1:
        return [files[name] for name in names] if len(names) >= source.count else []
    else:
        names = [name for name in names if fnmatch.fnmatch(name, source.prefer)] or names
    return [files[names[-1]]] if names else []


def _listing(source: Source) -> list[RemoteFile]:
    """Ask the hub which files fit; an address outside of the hub is its only file."""
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
        if isinstance(entry, RepoFile) and fnmatch.fnmatch(entry.path, source.files)
        for sha256 in [entry.lfs and entry.lfs.sha256]
    ]
    if not found:
        raise SfdError(f"{source.where} holds no {source.files} any more; look there by hand")
    return found


def _download(remote: RemoteFile, folder: Path) -> Path:
    """Download one file, going on where an earlier attempt stopped, and check it."""
    target = folder / remote.name
    if target.exists():
        print(f"{target} is here")
        return target
    # Part of the name: the rest of another version must not be appended to this one.
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
    if wrong := _wrong_download(part, remote.name):  # whatever the server or a portal before it calls it
        part.unlink()
        raise SfdError(f"{remote.url}: what came is {wrong}, and was removed") from fault
    if fault:
        raise fault
    if remote.sha256 and not (digest := file_sha256(part)).startswith(remote.sha256):
        part.unlink()
        raise SfdError(
            f"{remote.url}: its SHA-256 is {digest}, expected {remote.sha256}; it was damaged on the way or exchanged, "
            "and was removed"
        )
    part.rename(target)
    return target


def _download_rest(remote: RemoteFile, part: Path) -> None:
    """Append what is missing to `part`."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() if remote.on_hub else {}  # the token is for the hub alone
    about = {"headers": headers, "expected_size": remote.size, "displayed_filename": remote.name}
    with part.open("ab") as sink, _faults(remote.url):
        try:
            http_get(remote.url, sink, resume_size=sink.tell(), **about)
        except HfHubHTTPError as error:
            if error.response.status_code != 416:
                raise
            sink.truncate(0)  # the server has nothing behind what is there, so that is of something else
            sink.seek(0)
            http_get(remote.url, sink, **about)


def _wrong_download(path: Path, name: str) -> str:
    """Return what a download is where it can not be what its name says: a web page, a pointer, empty; else ""."""
    kind = kind_of(path)
    wanted = kind.what.startswith(NPZ) and name.endswith(".npz")
    return kind.what if kind.advice and not wanted else ""


class _Unreachable(Exception):
    """The server cannot be reached, has not what we ask for, or stops in the middle."""


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turn what the library raises into `_Unreachable`, a disk that is full aside."""
    try:
        yield
    except Exception as error:  # of httpx, huggingface_hub, json, ssl: whatever a server or network does
        if disk_fault(error):
            raise
        raise _Unreachable(f"{where} could not be fetched ({str(error).strip() or type(error).__name__})") from error


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")  # asked for at each call; the library reads it once, at its import


def _url(source: Source, path: str) -> str:
    if source.on_hub:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(source.where, path, endpoint=_endpoint())
    where = source.where
    if mirror := os.environ.get("SFD_MIRROR"):
        where = mirror.rstrip("/") + urllib.parse.urlsplit(where).path
    return f"{where}/{path}"
