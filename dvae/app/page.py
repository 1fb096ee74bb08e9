"""The page: a trained run to play with in a browser. The only file that imports gradio."""

from __future__ import annotations

import errno
import functools
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.app.page_guard import EVERYWHERE, Guard
from dvae.config import compose as configuration
from dvae.data.images import to_uint8
from dvae.errors import UserError, suggest
from dvae.inference import directions, editing
from dvae.inference import pipeline as pipelines
from dvae.inference.directions import direction_files
from dvae.inference.noise import InterpolationSpace
from dvae.inference.pipeline import Pipeline
from dvae.models import bundle
from dvae.registry.samplers.base import SAMPLERS, compatible_samplers
from dvae.tracking.console import say

PICTURE_FOLDER = Path(tempfile.gettempdir()) / f"dvae-page-{secrets.token_hex(8)}"
"""Where the pictures of this process lie while it serves."""
os.environ["GRADIO_TEMP_DIR"] = str(PICTURE_FOLDER)  # gradio reads this and the next when it is imported
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

try:
    import fastapi
    import gradio
    import uvicorn
except ImportError:
    raise UserError("the page needs gradio, which is not installed: pip install 'dvae[page]'") from None

DRAWN_IMAGES = 16
"""Images that are drawn together."""
MIN_IMAGE_SIDE = 128
"""Pixels that an image is at least wide on the page."""
STRIP_IMAGES = 8
"""Images of an interpolation."""
MAX_STRENGTH = 4.0
"""Greatest strength of the slider, either way."""
MAX_SEED = 2**53 - 1
"""Largest seed; a browser has no larger whole number."""
MAX_IMAGE_NUMBER = 2**31 - 1
"""Largest number of an image of a seed."""
MAX_STEPS = 250
"""Most steps, unless the run's own sampler takes more."""
PICTURE_SECONDS, CLEANUP_SECONDS = 600, 60
"""Seconds that a picture is kept for the browser, and between removals of older ones."""
MAX_QUEUED_CALLS = 16
"""Calls that may wait for the one that is computed."""
MAX_CONNECTIONS = 500
"""Connections at a time."""
FONT_FAMILY = ["system-ui", "sans-serif"]
"""Fonts of the reader's machine: none is fetched."""


@dataclass(kw_only=True, slots=True)
class PageConfig:
    """What tools/page.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    host: str = "127.0.0.1"
    """Address that it listens on; 0.0.0.0 lets other machines in, whoever they are, and under any name."""
    port: int = 7860
    """Port that it listens on (0: any that is free)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="page_schema", node=PageConfig, provider="dvae")


def parse_int(name: str, value: object, least: int, most: int) -> int:
    """A whole number that a browser has sent. Raises UserError if it is none, or not from `least` to `most`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name}={_shown(value)}: give a whole number from {least} to {most}")
    return value


def parse_float(name: str, value: object, least: float, most: float) -> float:
    """A number that a browser has sent. Raises UserError if it is none, or not from `least` to `most`."""
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise UserError(f"{name}={_shown(value)}: give a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]


def parse_choice(name: str, value: object, known: Collection[str]) -> str:
    """One of `known`. Raises UserError, naming the nearest, for anything else."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name}={_shown(value)}: {suggest(str(value)[:40], known)}")
    return value


def _shown(value: object) -> str:
    """A value of any size and kind in few characters."""
    return "(a huge number)" if type(value) is int and abs(value) > 10**40 else repr(value)[:40]


class PageActions:
    """The functions behind the page's buttons. They return pictures (H, W, 3) uint8; image k of a seed is that of
    tools/sample.py.

    Values come from a browser, and are checked here. Raises UserError for any that the page would not send.
    """

    def __init__(self, pipeline: Pipeline, known: dict[str, directions.Direction]) -> None:
        denoiser, own = pipeline.models.denoiser, SAMPLERS.name_of(pipeline.models.sampler)
        self.pipeline = pipeline
        self.known: dict[str, directions.Direction | int] = {**known}
        self.known |= {f"component {k}": k for k in range(1, denoiser.config.pca_components + 1)}
        self.samplers = sorted({own, *compatible_samplers(denoiser.diffusion, denoiser.shapes)})
        self.most_steps = max(MAX_STEPS, pipeline.models.sampler.config.steps)
        spaces = InterpolationSpace if pipeline.models.has_generator else [InterpolationSpace.noise]
        self.spaces = [space.name for space in spaces]

    def draw(self, seed: object, sampler: object, steps: object) -> tuple[np.ndarray | None, np.ndarray, str]:
        """DRAWN_IMAGES images of a seed: before refinement (None without an encoder), refined, and the evaluations."""
        checked_seed = parse_int("seed", seed, 0, MAX_SEED)
        with self._using(sampler, steps):
            vae, refined = self.pipeline.generate(DRAWN_IMAGES, checked_seed)
        return None if vae is None else mosaic(vae, 4), mosaic(refined, 4), self._evaluations()

    def edit(
        self, seed: object, image: object, direction: object, strength: object, sampler: object, steps: object
    ) -> tuple[np.ndarray, str]:
        """An image of a seed beside itself moved along a direction, or with a principal component put at the strength;
        above them what they were refined from."""
        number, checked_seed = parse_int("image", image, 0, MAX_IMAGE_NUMBER), parse_int("seed", seed, 0, MAX_SEED)
        edit = self.known[parse_choice("direction", direction, self.known)]
        new = parse_float("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        z = self.pipeline.conditioning_of([number], checked_seed).z
        if isinstance(edit, int):
            present = float(self.pipeline.models.denoiser.whitening(z)[0, edit - 1])
            unit = f"as it is, component {edit} stands at {present:.2f} standard deviations"
        else:
            present, unit = 0.0, f"strength 1: {edit.unit}"
        strengths = [present, new]
        edited = editing.latent_edit(self.pipeline, edit)(z.repeat_interleave(2, 0), torch.tensor(strengths).to(z))
        with self._using(sampler, steps):
            refined = self.pipeline.edit([number], edit, strengths, checked_seed)[0]
        return mosaic(torch.cat([to_uint8(self.pipeline.decode(edited)).cpu(), refined]), 2), unit

    def interpolate(
        self, seed: object, first: object, last: object, space: object, sampler: object, steps: object
    ) -> tuple[np.ndarray, str]:
        """A strip from one image of a seed to another."""
        ends = parse_int("from image", first, 0, MAX_IMAGE_NUMBER), parse_int("to image", last, 0, MAX_IMAGE_NUMBER)
        checked_seed, checked_space = parse_int("seed", seed, 0, MAX_SEED), parse_choice("space", space, self.spaces)
        with self._using(sampler, steps):
            strip = self.pipeline.interpolate(*ends, checked_space, STRIP_IMAGES, checked_seed)[0]
        return mosaic(strip, STRIP_IMAGES), self._evaluations()

    def _using(self, sampler: object, steps: object) -> AbstractContextManager[None]:
        """The run's own sampler keeps its other fields."""
        name = parse_choice("sampler", sampler, self.samplers)
        is_own = name == SAMPLERS.name_of(self.pipeline.models.sampler)
        return self.pipeline.using(None if is_own else name, steps=parse_int("steps", steps, 1, self.most_steps))

    def _evaluations(self) -> str:
        return f"{self.pipeline.nfe:g} network evaluations per image"


def mosaic(images: torch.Tensor, columns: int) -> np.ndarray:
    """Images (n, C, H, W) uint8 as one picture (height, width, 3), row by row, enlarged where they are small."""
    scale = max(1, MIN_IMAGE_SIDE // images.shape[3])
    pixels = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()


def show_user_errors(action: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but the page shows a UserError as a message."""

    @functools.wraps(action)
    def wrapped(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return wrapped


def picture(label: str, visible: bool = True) -> gradio.Image:
    """A picture that the page shows."""
    return gradio.Image(label=label, format="png", interactive=False, visible=visible, buttons=["download"])


def entry(label: str, value: int) -> gradio.Number:
    """A field for a whole number."""
    return gradio.Number(value, label=label, precision=0, minimum=0)


def connect(button: gradio.Button, action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Call `action` when the button is clicked."""
    # one at a time: the sampler that a call uses is the pipeline's. Values come as they were sent, since gradio's own
    # checks of them fail with a traceback at a text in the place of a number.
    button.click(
        show_user_errors(action), inputs, outputs, concurrency_id="pipeline", concurrency_limit=1, preprocess=False,
        api_name=action.__name__,
    )  # fmt: skip


def build(actions: PageActions, title: str) -> gradio.Blocks:
    """The page: new images, one image edited, the way between two."""
    own_sampler, models = actions.pipeline.models.sampler, actions.pipeline.models
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(CLEANUP_SECONDS, PICTURE_SECONDS)) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            seed = entry("seed", 0)
            sampler = gradio.Dropdown(actions.samplers, value=SAMPLERS.name_of(own_sampler), label="sampler")
            steps = gradio.Slider(1, actions.most_steps, value=own_sampler.config.steps, step=1, label="steps")
        with gradio.Tab("Draw"):
            button = gradio.Button("Draw images", variant="primary")
            with gradio.Row():
                generated, refined = picture("before refinement", visible=models.has_generator), picture("refined")
            evaluations = gradio.Markdown()
            connect(button, actions.draw, [seed, sampler, steps], [generated, refined, evaluations])
        if actions.known and not models.latent_space:
            with gradio.Tab("Edit"):
                with gradio.Row():
                    image = entry("image of the seed", 0)
                    direction = gradio.Dropdown(list(actions.known), label="direction")
                    strength = gradio.Slider(-MAX_STRENGTH, MAX_STRENGTH, value=1.0, step=0.25, label="strength")
                button = gradio.Button("Edit the image", variant="primary")
                edited, unit = picture("as it is, and edited; above, what each was refined from"), gradio.Markdown()
                connect(button, actions.edit, [seed, image, direction, strength, sampler, steps], [edited, unit])
        with gradio.Tab("Interpolate"):
            with gradio.Row():
                first, last = entry("from image", 0), entry("to image", 1)
                space = gradio.Dropdown(actions.spaces, value=actions.spaces[-1], label="what changes")
            button = gradio.Button("Draw the strip", variant="primary")
            strip, evaluations = picture("from one to the other"), gradio.Markdown()
            connect(button, actions.interpolate, [seed, first, last, space, sampler, steps], [strip, evaluations])
    return page.queue(max_size=MAX_QUEUED_CALLS, api_open=False)


def application(page: gradio.Blocks, host: str) -> Guard:
    """The web application of the page, behind its guard."""
    around = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    look = gradio.themes.Default(font=FONT_FAMILY, font_mono=["monospace"])
    app = gradio.mount_gradio_app(
        around, page, "/", footer_links=[], run_history=False, theme=look, show_error=False, max_file_size=1,
        ssr_mode=False, mcp_server=False, pwa=False,
    )  # fmt: skip
    inputs: dict[str | int, int] = {index: len(function.inputs) for index, function in page.fns.items()}
    inputs |= {str(function.api_name): len(function.inputs) for function in page.fns.values()}
    return Guard(app, host, PICTURE_FOLDER, inputs)


def listen(settings: PageConfig) -> socket.socket:
    """The socket that the page is served on. Raises UserError if there is no such address, or the port is taken."""
    host = settings.host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, settings.port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port={settings.port} is taken: use another port=") from None
        raise UserError(f"host={settings.host} port={settings.port}: {error.strerror or error}") from None
    except OverflowError:
        raise UserError(f"port={settings.port}: use 0 to 65535") from None


def browser_host(host: str) -> str:
    """A host that it listens on, as this machine's browser asks for it."""
    bare = host.strip("[]")
    if bare in EVERYWHERE:
        return "127.0.0.1"
    return f"[{bare}]" if ":" in bare else bare


@contextmanager
def own_folder() -> Iterator[None]:
    """A folder that nobody else can read, while the block runs."""
    PICTURE_FOLDER.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(PICTURE_FOLDER, ignore_errors=True)


def serve(settings: PageConfig) -> None:
    """Serve the page until the process is ended. Raises UserError if the port is taken, or the run draws points."""
    pipeline = pipelines.load(settings.run)
    configuration.refuse_points(pipeline.config, settings.run)
    vector = "encoder" in pipeline.models.trained_parts() and not pipeline.models.latent_space
    known = direction_files.load_all(bundle.find_bundle(settings.run)) if vector else {}
    title = f"{pipeline.config.recipe}: {Path(settings.run).resolve().name}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is removed
    with listen(settings) as listener, own_folder():
        guarded = application(build(PageActions(pipeline, known), title), settings.host)
        say(f"http://{browser_host(settings.host)}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        config = uvicorn.Config(
            guarded, log_level="warning", http="h11", ws="none", lifespan="on", limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=1, server_header=False,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):  # that is how it ends
            uvicorn.Server(config).run([listener])
