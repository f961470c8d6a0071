"""Where released files live, and how they get here: plain HTTPS, resumed, checked, cached.

A download goes to `NAME.part` and takes its name only when complete and checked, so a file under
its own name can be trusted, also one that was put there by hand. Sizes and SHA-256 sums come from
the hub's listing; PyTorch's releases carry the beginning of the sum in the file's name.

Environment: SFD_CACHE (default ~/.cache/sfd_jax), HF_ENDPOINT (another server in the hub's layout),
SFD_MIRROR (a server that has the other files under the paths of their addresses).
"""

import dataclasses
import fnmatch
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sfd_jax.convert.file_kinds import NPZ, kind_of
from sfd_jax.errors import SfdError, nearest

HUB = "https://huggingface.co"


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
    size: int | None = None
    sha256: str | None = None


def cache_dir() -> Path:
    """Return the folder of downloads and converted checkpoints."""
    return Path(os.environ.get("SFD_CACHE") or Path.home() / ".cache" / "sfd_jax")


def fetch(name: str, file: str | None = None, report: Callable[[str], None] = print) -> list[Path]:
    """Return the local files of a catalogue entry, downloading what is not there.

    Args:
      name: a key of CATALOGUE.
      file: which file, where an entry has several (a name, or a part of one).
      report: receives a line for each thing done.

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
            if wrong := _wrong_download(path):
                raise SfdError(f"'{path}' is {wrong}; remove it and run the same command again")
        report(f"{name}: found {', '.join(map(str, found))}")
        return found
    try:
        remote = {item.name: item for item in _listing(source)}
        chosen = _choose(source, remote, file)
        if not chosen:
            raise SfdError(f"{name} has no file '{file}'; it has {', '.join(sorted(remote))}")
        return [_download(item, folder, report) for item in chosen]
    except _Unreachable as error:
        if found:
            report(f"{name}: {error}; taking {found[0]}")
            return found
        address = _url(source, source.files)
        raise SfdError(
            f"{name}: {error}. Without a connection: fetch {address} on another machine, put "
            f"{basename} into {folder} and run the same command again"
        ) from error


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
    if "://" in source.where:
        digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", source.files)
        return [RemoteFile(_url(source, source.files), source.files, sha256=digits and digits[1])]
    folder = str(PurePosixPath(source.files.split("*")[0] + "x").parent)
    path = "" if folder == "." else "/" + urllib.parse.quote(folder)
    url = f"{_endpoint()}/api/models/{source.where}/tree/main{path}?recursive=true"
    with _open(url) as response:
        try:
            entries = json.load(response)
        except json.JSONDecodeError as error:
            raise _Unreachable(f"{url} did not answer with a listing") from error
    found = []
    for entry in entries:
        if entry.get("type") == "file" and fnmatch.fnmatch(entry["path"], source.files):
            lfs = entry.get("lfs") or {}
            size = lfs.get("size", entry.get("size"))
            url = _url(source, entry["path"])
            found.append(RemoteFile(url, PurePosixPath(entry["path"]).name, size, lfs.get("oid")))
    if not found:
        raise SfdError(f"{source.where} holds no {source.files} any more; look there by hand")
    return found


def _download(remote: RemoteFile, folder: Path, report: Callable[[str], None]) -> Path:
    """Download one file, going on where an earlier attempt stopped, and check it."""
    target = folder / remote.name
    if target.exists():
        report(f"{target} is here")
        return target
    # Part of the name: the rest of another version must not be appended to this one.
    part = folder / f"{remote.name}.{(remote.sha256 or str(remote.size))[:8]}.part"
    folder.mkdir(parents=True, exist_ok=True)
    report(f"{remote.url} -> {target}")
    size = remote.size
    for attempt in range(4):
        try:
            size = _download_rest(remote, part, size)
            if size is None or part.stat().st_size >= size:
                break
            reason = f"the connection ended after {part.stat().st_size} of {size} bytes"
        except _Dropped as error:
            reason = str(error)
        if attempt == 3:
            raise SfdError(f"{remote.url}: {reason}. What came is kept; run the same command again to go on")
        time.sleep(attempt)
    _check(remote, part, size)
    part.rename(target)
    return target


def _download_rest(remote: RemoteFile, part: Path, size: int | None) -> int | None:
    """Append what is missing to `part`; return the whole file's size where the server tells."""
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    if size is not None and start == size:
        return size
    if size is not None and start > size:
        part.unlink()
        start = 0
    try:
        response = _open(remote.url, {"Range": f"bytes={start}-"} if start else {})
    except _RangeRefused:
        part.unlink()
        return _download_rest(remote, part, size)
    with response:
        resumed = response.status == 206
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        size = size if length is None else start + int(length)
        bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=remote.name)
        with part.open("ab" if resumed else "wb") as sink, bar:
            try:
                while chunk := response.read(1 << 20):
                    sink.write(chunk)
                    bar.update(len(chunk))
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                raise _Dropped(str(error)) from error
    return size


def _check(remote: RemoteFile, part: Path, size: int | None) -> None:
    found = part.stat().st_size
    wrong = _wrong_download(part, remote.name)
    what = f" (it is {wrong})" if wrong else ""
    if remote.size not in (None, found) or size not in (None, found):
        part.unlink()
        raise SfdError(f"{remote.url}: {found} bytes came{what}, {remote.size or size} were expected; try again")
    if remote.sha256:
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if not digest.startswith(remote.sha256):
            part.unlink()
            raise SfdError(
                f"{remote.url}: its SHA-256 is {digest}{what}, expected {remote.sha256}; it was damaged on "
                "the way or exchanged, and was removed"
            )
    if wrong:
        part.unlink()
        raise SfdError(f"{remote.url}: what came is {wrong}, and was removed")


def _wrong_download(path: Path, name: str = "") -> str:
    """Return what a download is where it can not be what its name says: a web page, a pointer, empty; else ""."""
    kind = kind_of(path)
    wanted = kind.what.startswith(NPZ) and (name or path.name).endswith(".npz")
    return kind.what if kind.advice and not wanted else ""


class _Unreachable(Exception):
    """The server cannot be reached, or has not what we ask for."""


class _Dropped(Exception):
    """The connection ended in the middle of a file."""


class _RangeRefused(Exception):
    """The server has no bytes after those we have."""


def _open(url: str, headers: dict[str, str] = {}):
    request = urllib.request.Request(url, headers={"User-Agent": "sfd_jax", **headers})
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            raise _RangeRefused from error
        raise _Unreachable(f"{url} answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise _Unreachable(f"{url} cannot be reached ({reason})") from error


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def _url(source: Source, path: str) -> str:
    if "://" not in source.where:
        return f"{_endpoint()}/{source.where}/resolve/main/{urllib.parse.quote(path, safe='/*')}"
    where = source.where
    if mirror := os.environ.get("SFD_MIRROR"):
        where = mirror.rstrip("/") + urllib.parse.urlsplit(where).path
    return f"{where}/{path}"
