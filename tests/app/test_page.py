"""The page in a real browser: every tab is used by clicking, and the pictures are those of tools/sample.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import ROOT, Tool, environment

import dvae
from dvae.config import compose
from dvae.config.model_config import model_config
from dvae.inference import directions
from dvae.inference.directions import Direction, DirectionMethod
from dvae.inference.pipeline import Pipeline
from dvae.models import bundle_export, components

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WAIT = 60
"""Seconds that a click may take, on a busy machine."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """The bundle of a run that was never trained, with a direction."""
    composed = compose.compose("train", [*tiny, "denoiser.data_scale=1", "train_refiner.precision=fp32"])
    made = components.build_models(compose.to_run_config(composed))
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    folder = tmp_path_factory.mktemp("page") / "bundle"
    bundle_export.export(
        folder,
        compose.to_run_config(composed),
        {name: part.state_dict() for name, part in made.trained_parts().items()},
    )
    directions.save(
        folder, [Direction("wide", torch.linspace(-1, 1, 8), DirectionMethod.pca, "one standard deviation")]
    )
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Where the page of that run is served, by the real command."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tools" / "page.py"), f"run={run}", f"port={port}"]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = server.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        yield found[0]
    finally:
        server.terminate()  # it removes its folder then
        server.wait(60)


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    flags += ["disable-sync", "no-first-run", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for flag in [*flags, "window-size=1200,1000"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as opened:
        opened.get(address)
        yield opened


def click(browser: Any, words: str) -> None:
    """Click the tab or button of these words."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def found(driver: Any) -> Any:
        return [b for b in driver.find_elements(By.TAG_NAME, "button") if b.text == words and b.is_displayed()]

    WebDriverWait(browser, WAIT).until(found)[0].click()


def pictures(browser: Any, count: int, before: list[str]) -> tuple[list[str], list[np.ndarray]]:
    """Addresses and pixels of the pictures that are shown once there are `count`, none of them as `before`."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = "return [...document.images].filter(i => i.offsetParent && i.naturalWidth > 0).map(i => i.src)"

    def ready(driver: Any) -> list[str] | None:
        shown = driver.execute_script(script)
        return shown if len(shown) == count and not set(shown) & set(before) else None

    shown = WebDriverWait(browser, WAIT).until(ready)
    read = "return fetch(arguments[0]).then(r => r.blob()).then(b => new Promise(done => {const f = new FileReader();"
    read += "f.onload = () => done(f.result); f.readAsDataURL(b)}))"
    data = [base64.b64decode(browser.execute_script(read, url).partition(",")[2]) for url in shown]
    return shown, [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in data]


def keep(browser: Any, name: str) -> None:
    """Screenshots go to the folder named by PAGE_SCREENSHOTS, so that a person can look at them."""
    if folder := os.environ.get("PAGE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def small(picture: np.ndarray, columns: int, size: int = 16) -> torch.Tensor:
    """The images (n, 3, size, size) of a picture of the page."""
    scale = picture.shape[1] // (columns * size)
    pixels = torch.from_numpy(picture[::scale, ::scale].copy()).permute(2, 0, 1)
    return pixels.unflatten(1, (-1, size)).unflatten(3, (-1, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver, which are not installed")
def test_every_tab_by_clicking(browser: Any, run: Path) -> None:
    pipeline = dvae.load(run)
    click(browser, "Draw images")
    shown, (vae, refined) = pictures(browser, 2, [])
    keep(browser, "draw")
    wanted = pipeline.generate(16, 0)
    assert wanted[0] is not None
    assert torch.equal(small(vae, 4), wanted[0])
    assert torch.equal(small(refined, 4), wanted[1])

    click(browser, "Edit")
    click(browser, "Edit the image")
    shown, (edited,) = pictures(browser, 1, shown)
    keep(browser, "edit")
    strip = pipeline.edit([0], directions.load(run, "wide"), [0.0, 1.0], 0)[0]
    assert torch.equal(small(edited, 2)[2:], strip)
    assert torch.equal(small(edited, 2)[0], wanted[0][0])

    click(browser, "Interpolate")
    click(browser, "Draw the strip")
    _, (strip,) = pictures(browser, 1, shown)
    keep(browser, "interpolate")
    assert torch.equal(small(strip, 8), pipeline.interpolate(0, 1, "both", 8, 0)[0])

    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    elsewhere = [url for url in asked if url.startswith(("http", "ws")) and "://127.0.0.1" not in url]
    assert elsewhere == []  # the page works without a network


@pytest.mark.slow
def test_a_port_in_use_is_one_line(address: str, run: Path, tool: Tool) -> None:
    done = tool("page", f"run={run}", f"port={address.rpartition(':')[2]}")
    assert (done.returncode, done.stderr.splitlines()[-1].endswith("is taken: use another port=")) == (2, True)


def test_principal_components_are_sliders_and_samplers_fit_the_refiner(tiny: list[str]) -> None:
    from dvae.app.page import PageActions

    words = [*tiny, "denoiser.data_scale=1", "train_refiner.precision=fp32", "denoiser.pca_components=2"]
    made = compose.to_run_config(compose.compose("train", words))
    actions = PageActions(Pipeline(model_config(made), components.build_models(made)), {})
    assert list(actions.known) == ["component 1", "component 2"]
    assert "ddim" in actions.samplers
    assert "consistency" not in actions.samplers  # for refiners that were distilled for it
    shown, said = actions.edit(0, 3, "component 2", 1.0, "ddim", 2)
    own = float(said.split()[-3])
    same, _ = actions.edit(0, 3, "component 2", own, "ddim", 2)
    wide = shown.shape[1] // 2
    assert np.abs(same[:, :wide].astype(int) - same[:, wide:]).max() <= 1  # own is told with two decimals
    assert np.array_equal(shown[:, :wide], same[:, :wide])
    assert not np.array_equal(shown[:, :wide], shown[:, wide:])


def test_a_latent_that_is_a_map_is_edited() -> None:
    from dvae.app.page import PageActions

    words = [
        "recipe=demo", "image_size=16", "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4",
        "encoder.discriminator_weight=0", "encoder.middle_attention=false", "prior=normal", "refiner.width=32",
        "refiner.multipliers=[1]", "refiner.blocks=1", "refiner.attention_resolutions=[]",
        "denoiser.condition_latent=false", "denoiser.data_scale=1",
    ]  # fmt: skip
    made = compose.to_run_config(compose.compose("train", words))
    pipeline = Pipeline(model_config(made), components.build_models(made))
    shape = pipeline.models.shapes.latent
    assert len(shape) == 3
    wide = Direction("wide", torch.ones(shape), DirectionMethod.pca, "one standard deviation")
    shown, said = PageActions(pipeline, {"wide": wide}).edit(0, 1, "wide", 2.0, "ddim", 2)
    assert said == "strength 1: one standard deviation"
    assert not np.array_equal(*np.split(shown, 2, axis=1))
