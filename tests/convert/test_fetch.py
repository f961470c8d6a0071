"""Fetching, against a local server in the hub's layout."""

import hashlib
import http.server
import json
import logging.handlers
import re
import threading
import urllib.parse

import jax
import numpy as np
import pytest
import safetensors.numpy

from sfd_jax.cli.fetch import main
from sfd_jax.convert import FORMATS, hub
from sfd_jax.convert.table import export_state
from sfd_jax.errors import SfdError
from sfd_jax.models import Network
from sfd_jax.training.checkpoint import load_params


class Hub:
    """A hub in memory: files by (repository, path), a log of requests, and faults to inject."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.tokens: dict[str, str | None] = {}  # by path
        self.drop_after: int | None = None  # break the next download after so many bytes
        self.spoil = False
        self.page = b""  # sent in place of every file
        self.ranges = True


def _lfs(data: bytes) -> dict:
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        store: Hub = self.server.store
        wanted = self.headers.get("Range")
        store.requests.append((self.path, wanted))
        store.tokens[self.path.split("?")[0]] = self.headers.get("Authorization")
        path = urllib.parse.unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main/?(.*)", path):
            return self._list(store.files.get(match[1]), match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            if match[2] not in store.files.get(match[1], {}):
                return self.send_error(404)
            # The hub sends large files from another address.
            self.send_response(302)
            self.send_header("Location", f"/cdn/{match[1]}/{match[2]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        match = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path)
        data = store.files[match[1]][match[2]] if match else store.files.get("other", {}).get(path)
        return self.send_error(404) if data is None else self._send(data, wanted)

    def _list(self, files, folder):
        if files is None:
            return self.send_error(404)
        entries = [
            {"type": "file", "path": p, "size": len(d), "oid": "0" * 40, "lfs": _lfs(d)}
            for p, d in files.items()
            if p.startswith(folder)
        ]
        body = json.dumps(entries + [{"type": "directory", "path": folder, "oid": "0" * 40}]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, data, wanted):
        store: Hub = self.server.store
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and store.ranges else 0
        if start >= len(data) > 0:
            return self.send_error(416)
        if store.page:
            data = store.page
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        body = data[start:]
        if store.spoil:
            body = body[::-1]
        if store.drop_after is not None:
            body, store.drop_after = body[: store.drop_after], None
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running hub; the cache is empty, and every address points to the hub."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.store = Hub()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("SFD_MIRROR", address)
    monkeypatch.setenv("SFD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # a partial file is a multiple of it
    yield httpd.store
    httpd.shutdown()
    httpd.server_close()


REPO = hub.CATALOGUE["sfd_xl"].where
DATA = bytes(range(256)) * 3000


def test_a_broken_download_is_resumed(server, tmp_path):
    server.files[REPO] = {"model_weights/sfd_xl/0400000.pt": DATA[::-1], "model_weights/sfd_xl/4000000.pt": DATA}
    server.drop_after = 100_000
    (path,) = hub.fetch("sfd_xl")
    assert path == tmp_path / "cache" / "downloads" / "sfd_xl" / "4000000.pt"
    assert path.read_bytes() == DATA
    ranges = [wanted for url, wanted in server.requests if url.startswith("/cdn")]
    assert ranges == [None, "bytes=100000-"]
    # A file in the cache needs no request; another file of the entry does.
    count = len(server.requests)
    assert hub.fetch("sfd_xl") == [path] and len(server.requests) == count
    assert hub.fetch("sfd_xl", "0400000")[0].read_bytes() == DATA[::-1]
    assert not list(path.parent.glob("*.part"))


def test_an_interrupted_command_is_resumed_too(server):
    server.files[REPO] = {"model_weights/sfd_xl/1.pt": DATA}
    digest = hashlib.sha256(DATA).hexdigest()
    part = hub.cache_dir() / "downloads" / "sfd_xl" / f"1.pt.{digest[:8]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:5000])
    assert hub.fetch("sfd_xl")[0].read_bytes() == DATA
    assert server.requests[-1][1] == "bytes=5000-"


def test_a_server_without_ranges_sends_all_again(server):
    server.files[REPO] = {"model_weights/sfd_xl/1.pt": DATA}
    server.drop_after, server.ranges = 1000, False
    assert hub.fetch("sfd_xl")[0].read_bytes() == DATA


def test_a_damaged_download_is_refused_and_removed(server):
    server.files[REPO] = {"model_weights/sfd_xl/1.pt": DATA}
    server.spoil = True
    with pytest.raises(SfdError, match="SHA-256"):
        hub.fetch("sfd_xl")
    assert not [p for p in (hub.cache_dir() / "downloads").rglob("*") if p.is_file()]


def test_the_checksum_in_a_file_name_is_checked(server):
    source = hub.CATALOGUE["inception"]
    where = f"/mseitzer/pytorch-fid/releases/download/fid_weights/{source.files}"
    server.files["other"] = {where: DATA}
    with pytest.raises(SfdError, match="expected 6726825d"):
        hub.fetch("inception")


def test_a_file_outside_the_hub(server):
    source = hub.CATALOGUE["adm_reference_256"]
    where = "/diffusion/jul-2021/ref_batches/imagenet/256/" + source.files
    server.files["other"] = {where: DATA}
    assert hub.fetch("adm_reference_256")[0].read_bytes() == DATA


def test_the_token_goes_only_to_the_hub(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files[REPO] = {"model_weights/sfd_xl/1.pt": DATA}
    where = "/diffusion/jul-2021/ref_batches/imagenet/256/" + hub.CATALOGUE["adm_reference_256"].files
    server.files["other"] = {where: DATA}
    hub.fetch("sfd_xl")
    hub.fetch("adm_reference_256")
    assert server.tokens[f"/{REPO}/resolve/main/model_weights/sfd_xl/1.pt"] == "Bearer hf_secret"
    assert server.tokens[where] is None


PAGE = b"<!DOCTYPE html><html><title>Log in</title></html>"


def test_a_web_page_instead_of_a_file_is_named_and_removed(server):
    """A portal or a moved address answers every request with a page and status 200."""
    for name, folder, said in (
        ("adm_reference_256", "/diffusion/jul-2021/ref_batches/imagenet/256/", "the download is a web page"),
        ("inception", "/mseitzer/pytorch-fid/releases/download/fid_weights/", "the download is a web page.*removed"),
    ):
        server.files["other"] = {folder + hub.CATALOGUE[name].files: PAGE}
        with pytest.raises(SfdError, match=said):
            hub.fetch(name)
    assert not [path for path in hub.cache_dir().rglob("*") if path.is_file()]


def test_a_web_page_instead_of_a_file_of_the_hub_is_removed(server):
    server.files[REPO], server.page = {"model_weights/sfd_xl/1.pt": DATA}, PAGE
    with pytest.raises(SfdError, match="the download is a web page"):
        hub.fetch("sfd_xl")
    assert not [path for path in hub.cache_dir().rglob("*") if path.is_file()]
    server.page = b""
    assert hub.fetch("sfd_xl")[0].read_bytes() == DATA


def test_a_complete_part_is_downloaded_again(server):
    """A command killed between the last byte and the renaming leaves one."""
    where = "/diffusion/jul-2021/ref_batches/imagenet/256/" + hub.CATALOGUE["adm_reference_256"].files
    server.files["other"] = {where: DATA}
    part = hub.cache_dir() / "downloads" / "adm_reference_256" / f"{hub.CATALOGUE['adm_reference_256'].files}.None.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(DATA)))
    assert hub.fetch("adm_reference_256")[0].read_bytes() == DATA


def test_a_wrong_file_copied_there_by_hand_is_named(server):
    folder = hub.cache_dir() / "downloads" / "texture_vae"
    folder.mkdir(parents=True)
    (folder / "ldm-imagenet256-f16d32-50ep.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SfdError, match="ckpt' is a Git LFS pointer.*remove it and run the same command again"):
        hub.fetch("texture_vae")


def test_an_encoder_is_fetched_with_its_config_json(server, capsys):
    """The weights under either name, with the number of heads from the file beside them."""
    network = Network("mae", dict(width=24, depth=1, num_heads=2, image_size=8, patch_size=4))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.abstract_params())
    weights = safetensors.numpy.save(export_state(FORMATS["mae"].TABLE, params, network))
    config = json.dumps({"model_type": "vit_mae", "num_attention_heads": 2}).encode()
    server.files[hub.CATALOGUE["mae"].where] = {"pytorch_model.bin": weights, "tf_model.h5": b"", "config.json": config}
    for _ in range(2):
        assert main(["mae"]) == 0
        assert sum(path.startswith("/cdn/") for path, _ in server.requests) == 2
    assert load_params(capsys.readouterr().out.splitlines()[-1])[1]["network_config"]["num_heads"] == 2
    downloads = hub.cache_dir() / "downloads" / "mae"
    assert {path.name for path in downloads.iterdir()} == {"pytorch_model.bin", "config.json"}
    (downloads / "config.json").unlink()
    server.files.clear()
    assert hub.fetch("mae") == [downloads / "pytorch_model.bin"]  # by hand, without it


def test_a_gated_repository_says_what_to_do(server):
    with pytest.raises(SfdError, match="gated: accept its licence on its page and set HF_TOKEN.*and config.json into"):
        hub.fetch("dinov3")


def test_offline_the_message_says_which_file_to_copy_where(monkeypatch, tmp_path):
    monkeypatch.setenv("SFD_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    repeated = logging.handlers.BufferingHandler(1000)
    logging.getLogger().addHandler(repeated)
    with pytest.raises(SfdError) as error:
        hub.fetch("texture_vae")
    logging.getLogger().removeHandler(repeated)
    assert not repeated.buffer  # the library prints its warnings itself; those of the root's handler would be second
    folder = tmp_path / "downloads" / "texture_vae"
    message = str(error.value)
    for part in ("could not be fetched", "resolve/main/ldm-imagenet256-f16d32-50ep.ckpt", str(folder)):
        assert part in message
    with pytest.raises(SfdError, match=r"resolve/main/model.safetensors and config.json beside it on another machine"):
        hub.fetch("dinov3")
    folder.mkdir(parents=True)
    by_hand = folder / "ldm-imagenet256-f16d32-50ep.ckpt"
    by_hand.write_bytes(DATA)
    assert hub.fetch("texture_vae") == [by_hand]


def test_unknown_names_and_files(server):
    with pytest.raises(SfdError, match="did you mean 'sfd_xl'"):
        hub.fetch("sfd_x")
    with pytest.raises(SfdError, match="did you mean 'dinov3'"):
        main(["dinov9"])
    with pytest.raises(SfdError, match="404"):
        hub.fetch("semantic_vae")
    server.files[REPO] = {"README.md": b"x"}
    with pytest.raises(SfdError, match="no longer holds semantic_vae"):
        hub.fetch("semantic_vae")
    server.files[REPO] = {"model_weights/sfd_xl/1.pt": DATA}
    with pytest.raises(SfdError, match=r"no file '9'; it has 1\.pt"):
        hub.fetch("sfd_xl", "9")


def test_the_command_fetches_converts_and_caches(server, torch_file, capsys):
    """From the hub to a checkpoint with its statistics, twice: the second time from the cache."""
    config = dict(width=16, depth=1, num_heads=2, input_size=2, in_channels=5, num_classes=3)
    network = Network("lightning_dit", config)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), network.abstract_params())
    state = export_state(FORMATS["lightning_dit"].TABLE, params, network)

    def statistics(channels):
        arrays = {k: np.ones((1, channels, 1, 1), np.float32) for k in ("mean", "std")}
        return torch_file(arrays).zip_bytes()

    server.files[REPO] = {
        "model_weights/sfd_autoguidance_b/0060000.pt": b"",
        "model_weights/sfd_autoguidance_b/0070000.pt": torch_file({"ema": state}).zip_bytes(),
        "model_weights/sfd_autoguidance_b/0120000.pt": b"",
        "imagenet1k-latents/latents_stats.pt": statistics(3),
        "imagenet1k-latents/latents_sv_stats.pt": statistics(2),
    }
    for _ in range(2):
        assert main(["sfd_autoguidance_b"]) == 0
        target = hub.cache_dir() / "sfd_autoguidance_b" / "70000"
        assert capsys.readouterr().out.splitlines()[-1] == str(target)
        count = len(server.requests)
    assert len(server.requests) == count
    loaded, metadata = load_params(target)
    assert metadata["latent_statistics"]["semantic_mean"] == [1.0, 1.0]
    np.testing.assert_array_equal(loaded["label_embed"]["embedding"], np.ones((4, 16)))
    assert main(["--list"]) == 0 and "dinov2_vitb14_reg" in capsys.readouterr().out
