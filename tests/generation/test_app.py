"""`sfd app`: what the page refuses; the page, and the demo's report, in a browser."""

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import CHROMIUM, Browser, wait_for
from test_commands import DIT, VAE, save_random

from sfd_jax import Pipeline
from sfd_jax.data.latent_store import LatentStoreWriter, Plan, latent_fields
from sfd_jax.errors import SfdError
from sfd_jax.experiment.app import MOST_REQUEST_BYTES, Studio
from sfd_jax.latents import LatentStatistics

GOOD = {"label": "otter", "seed": 0, "num": 4, "guidance": "none", "scale": 1.5, "solver": "dopri5", "nfe": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a demo with drawn weights and nine training latents."""
    folder = tmp_path_factory.mktemp("model")
    statistics = LatentStatistics(np.zeros(3), np.ones(3), np.zeros(2), np.ones(2)).to_dict()
    about = {"latent_statistics": statistics, "class_names": ["otter", "heron", "a", "b", "c"]}
    sample = {"guidance": "autoguidance", "guidance_scale": 1.5}
    save_random(folder / "diffusion", "lightning_dit", DIT, 0, **about, config={"sample": sample})
    save_random(folder / "weak", "lightning_dit", DIT, 2, **about)
    save_random(folder / "texture_vae", "texture_vae", VAE, 1)
    fields = latent_fields((4, 4, 3), (4, 4, 2), dtype="float32", flips=False)
    writer = LatentStoreWriter(folder / "latents", Plan(9, 9, fields, {}, {}, about["class_names"]))
    rng = np.random.default_rng(0)
    with writer.open_shard(0) as records:
        for index in range(9):
            arrays = {name: rng.standard_normal(field["shape"]) for name, field in fields.items()}
            records.add({**arrays, "label": index % 5, "index": index})
    writer.finish()
    return folder


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"label": " "}, "type the name or the number of a class"),
        ({"label": "otters"}, "did you mean 'otter'"),
        ({"label": ["otter"]}, "type the name"),
        ({"label": "0;" * 200}, "too long"),
        ({"num": 10**6}, "from the lists"),
        ({"guidance": "autoguidanc"}, "from the lists"),
        ({"solver": "sde_euler"}, "from the lists"),
        ({"seed": None}, "the seed must be a number"),
        ({"seed": 0.5}, "the seed must be a whole number"),
        ({"seed": -1}, "seed"),
        ({"scale": float("nan")}, "the scale must be a number"),
        ({"guidance": "cfg", "scale": 1e9}, "guidance_scale"),
        ({"solver": "euler", "nfe": 10**9}, "give 1 to 200 network evaluations"),
        ({"solver": "euler", "nfe": 1}, "at least 3 network evaluations"),
    ],
)
def test_a_request_that_is_not_allowed_gets_a_sentence(model, wrong, words):
    studio = Studio(Pipeline.from_pretrained(model))
    assert studio.guidances == ["autoguidance", "none", "cfg"] and not studio.shows_neighbours
    with pytest.raises(SfdError, match=words):
        studio.make(**GOOD | wrong)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra app")
def test_the_page_in_a_browser(model, root, quick, browser):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sfd_jax", "app", f"--model={model}", f"--port={port}"]
    server = subprocess.Popen(command, cwd=root, env=quick, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        printed = iter(server.stdout.readline, "")
        assert any(f"http://127.0.0.1:{port}" in line for line in printed)
        again = subprocess.run(command, cwd=root, env=quick, text=True, capture_output=True)
        assert again.returncode == 2 and "choose another --port" in again.stderr
        visitors = [browser.open(f"http://127.0.0.1:{port}/") for _ in range(2)]
        made = "document.querySelectorAll('#images img').length"
        for visitor, name in zip(visitors, ("heron", "2"), strict=True):
            visitor.wait_for("document.querySelector('#make') !== null")
            visitor.type_into("input[aria-label^='Class']", name)
        for visitor in visitors:  # at once
            visitor.js("document.querySelector('#make').click()")
        for visitor in visitors:
            assert visitor.wait_for(made) == 4
            assert "evaluations of two networks" in visitor.js("document.querySelector('#cost').innerText")
            assert visitor.wait_for("document.querySelectorAll('#near img').length") == 4
        first, second = (visitor.js("document.querySelector('#images img').src") for visitor in visitors)
        assert first != second

        # The slider shows the first image at another time.
        texture = "document.querySelector('#texture img').src"
        at_the_end = visitors[0].js(texture)
        visitors[0].move_slider("#time input[type=range]", 0)
        assert visitors[0].wait_for(f"{texture} !== {json.dumps(at_the_end)} && {texture}")

        visitors[1].type_into("input[aria-label^='Class']", "otters")
        visitors[1].js("document.querySelector('#make').click()")
        assert visitors[1].wait_for("document.body.innerText.includes(\"did you mean 'otter'\")")
        loaded = visitors[0].js("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(f"127.0.0.1:{port}" in name or name.startswith("data:") for name in loaded)

        # Requests that would fill the memory or the disk are refused.
        def post(path, body, kind):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": kind})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            return refused.value.code

        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nmany\r\n--x--\r\n'
        assert post("/gradio_api/upload", part, "multipart/form-data; boundary=x") == 413
        assert (
            post("/gradio_api/queue/join", b'{"data": ["' + b" " * MOST_REQUEST_BYTES + b'"]}', "application/json")
            == 400
        )
    finally:
        server.send_signal(signal.SIGINT)
        assert wait_for(lambda: server.poll() is not None, 60)


@pytest.mark.slow
def test_the_report_of_a_demo_in_a_browser(browser, tiny_demo, tmp_path):
    """The file alone, without the folder beside it."""
    shutil.copy(tiny_demo.folder / "report.html", tmp_path)
    page = browser.open("about:blank")
    address = (tmp_path / "report.html").as_uri()
    page.go_to(address)
    images = "[...document.images]"
    assert page.js(f"{images}.length") == 5  # samples, neighbours, losses; both groups of the stages
    assert page.js(f"{images}.every(image => image.complete && image.naturalWidth > 0)")
    assert page.js(f"{images}.every(image => image.getBoundingClientRect().right <= innerWidth)")
    shown = "['semantic', 'texture'].map(name => document.querySelector(`.${name} img`).src)"
    said = "[...document.querySelectorAll('figcaption, output')].map(each => each.textContent).join('; ')"
    at_the_end = page.js(shown)
    assert page.js(said) == "semantic, t = 1.00; texture, t = 1.00; 1.30"
    page.move_slider("input[type=range]", 2)
    between = page.js(shown)
    assert page.js(said) == "semantic, t = 0.37; texture, t = 0.07; 0.37"
    assert not {*between} & {*at_the_end}
    assert page.js(f"{images}.every(image => image.complete && image.naturalWidth > 0)")
    page.move_slider("input[type=range]", 7)
    assert page.js(shown) == at_the_end
    requests = [about["request"]["url"] for method, about in page.events if method == "Network.requestWillBeSent"]
    assert {url for url in requests if not url.startswith("data:")} == {address}  # nothing from elsewhere
    wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    assert [event for event in page.events if event[0] in wrong] == []
