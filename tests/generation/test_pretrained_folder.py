"""A saved pipeline: the same images from its folder and from a hub, the same bytes wherever it is written."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import numpy as np
import pytest
from test_commands import DIT, VAE, save_random

from sfd_jax import Pipeline
from sfd_jax.errors import SfdError
from sfd_jax.latents import LatentStatistics

STATISTICS = LatentStatistics(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)).to_dict()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of drawn weights, from checkpoints whose metadata name folders of this machine."""
    folder = tmp_path_factory.mktemp("parts")
    about = {"latent_statistics": STATISTICS, "class_names": ["otter", "heron", "a", "b", "c"]}
    config = {"data": {"path": str(folder), "image_size": 8}, "mesh": {"data": 8}, "clocks": {"name": "synchronous"}}
    config["sample"] = {"solver": "euler", "num_steps": 4, "guidance": "autoguidance", "guidance_scale": 1.5}
    save_random(folder / "diffusion", "lightning_dit", DIT, 0, **about, config=config)
    save_random(folder / "weak", "lightning_dit", DIT, 2, **about)
    save_random(folder / "texture_vae", "texture_vae", VAE, 1)
    return Pipeline.from_pretrained(folder)


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of the hub as uploading and downloading a repository takes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def commit(self):
        return hashlib.sha1(b"".join(self.server.files.values())).hexdigest()

    def answer(self, value=None, body=None, status=200, **headers):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        files, path = self.server.files, urllib.parse.unquote(self.path.split("?")[0])
        self.server.log.append(f"{self.command} {path}")
        if re.fullmatch(r"/api/models/me/digits(/revision/\w+)?", path) and files:
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": "me/digits", "modelId": "me/digits", "sha": self.commit, "siblings": siblings})
        if (match := re.fullmatch(r"/me/digits/resolve/\w+/(.+)", path)) and match[1] in files:
            data = files[match[1]]
            return self.answer(body=data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        if match := re.fullmatch(r"/api/models/me/digits/tree/\w+/?", path):
            return self.answer([{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()])
        self.answer({"error": "nothing there"}, status=404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        files, path, address = self.server.files, self.path.split("?")[0], f"http://{self.headers['Host']}"
        self.server.log.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_mine":
            return self.answer({"error": "no right to write here"}, status=401)
        if path == "/api/repos/create":
            return self.answer({"url": f"{address}/me/digits", "id": "me/digits"})
        if path == "/api/validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            lfs = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            modes = [{"path": f["path"], "uploadMode": lfs(f["path"])} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            upload = lambda o: {"upload": {"href": f"{address}/upload/{o['oid']}"}}
            objects = [{**o, "actions": upload(o)} for o in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            import base64

            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = self.server.uploaded[value["oid"]]
            return self.answer({"commitUrl": f"{address}/me/digits/commit/{self.commit}", "commitOid": self.commit})
        self.answer({"error": "nothing there"}, status=404)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploaded[self.path.removeprefix("/upload/")] = data
        self.answer({})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.uploaded, server.log = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The library reads it at its import: here it is set later, whatever other tests imported before.
    public = "https://huggingface.co"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", public)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", public + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_URL_HOSTS", frozenset({"huggingface.co"}), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_gives_back_what_was_pushed(pipeline, hub, tmp_path, monkeypatch):
    scores = tmp_path / "scores.json"
    scores.write_text('{"scores": {"fid": 3.25}, "recipe": {"num_images": 50000}}')
    address = pipeline.push_to_hub("me/digits", licence="mit", scores=scores, guidance_scale=2.0)
    assert "/me/digits/commit/" in address
    card = hub.files["README.md"].decode()
    for text in (
        "license: mit",
        'from_pretrained("me/digits")',
        'generate("otter")',
        "| fid | 3.25 |",
        "50000",
        "synchronous",
    ):
        assert text in card
    assert "guidance_scale 2.0" in card and "8 x 8 px of 5 classes" in card

    other = Pipeline.from_pretrained("me/digits")
    assert pipeline.save_pretrained(tmp_path / "own", guidance_scale=2.0).name == "own"
    for file in (tmp_path / "own").iterdir():
        if file.name != "README.md":  # where the hub's has its name and scores
            assert hub.files[file.name] == file.read_bytes()
            assert str(tmp_path.parent).encode() not in file.read_bytes()  # no folder of this machine
    images = other.generate(["heron", 0], 3, seed=4)
    assert images.pixels.shape == (3, 8, 8, 3) and images[1].size == (8, 8) and images.labels.tolist() == [1, 0, 1]
    assert images.nfe.tolist() == [3, 3, 3] and images.recipe["sampler"]["guidance_scale"] == 2.0
    expected = pipeline.generate(["heron", 0], 3, seed=4, guidance_scale=2.0)
    np.testing.assert_array_equal(images.pixels, expected.pixels)

    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(SfdError, match="'me/digits' could not be written .*401.*HF_TOKEN"):
        pipeline.push_to_hub("me/digits")
    hub.files["config.json"] = b"{}"
    with pytest.raises(SfdError, match="'me/digits' was not saved by Pipeline.save_pretrained"):
        Pipeline.from_pretrained("me/digits")
    with pytest.raises(SfdError, match="'me/nothing' is no folder, and was not found on the hub"):
        Pipeline.from_pretrained("me/nothing")


def test_faults_of_a_folder_are_named_and_lose_nothing(pipeline, tmp_path):
    folder = pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(SfdError, match="exists and is not an empty folder"):
        pipeline.save_pretrained(folder)
    with pytest.raises(SfdError, match="did you mean 'guidance_scale'"):
        pipeline.save_pretrained(tmp_path / "other", guidance_scal=2)
    (scores := tmp_path / "scores.json").write_text('{"fid": 3.25}')
    with pytest.raises(SfdError, match="scores.json' is not a file of `sfd evaluate --out`"):
        pipeline.save_pretrained(tmp_path / "other", scores=scores)
    scores.write_text('{"scores": {"fid": 3.25}, "recipe": {"sampling": {"model": {"hash": "0123456789abcdef"}}}}')
    with pytest.raises(SfdError, match=r"scores.json' are of samples of another model \(hash 0123456789ab"):
        pipeline.save_pretrained(tmp_path / "other", scores=scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "scores.json"]
    weights = (folder / "weak.safetensors").read_bytes()
    (folder / "weak.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(SfdError, match="weak.safetensors' is not the file that config.json was written with"):
        Pipeline.from_pretrained(folder)
    (folder / "weak.safetensors").unlink()
    with pytest.raises(SfdError, match="weak.safetensors"):
        Pipeline.from_pretrained(folder)
