"""The page: a web page on which a user explores a trained run. This is the only file that imports gradio."""

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
"""Folder of this process's pictures while it serves. Its random name lets several servers run at the same time."""
# gradio reads this variable and the next one when it is imported, so they must be set before the import
os.environ["GRADIO_TEMP_DIR"] = str(PICTURE_FOLDER)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

try:
    import fastapi
    import gradio
    import uvicorn
except ImportError:
    raise UserError("the page needs gradio, which is not installed: pip install 'dvae[page]'") from None

DRAWN_IMAGES = 16
"""Number of images that are generated together."""
MIN_IMAGE_SIDE = 128
"""Smaller images are enlarged by the largest whole factor with which they are at most this wide, in pixels."""
STRIP_IMAGES = 8
"""Number of images in an interpolation."""
MAX_STRENGTH = 4.0
"""Largest absolute strength of the slider."""
MAX_SEED = 2**53 - 1
"""Largest seed. Browsers cannot represent all larger integers exactly."""
MAX_IMAGE_NUMBER = 2**31 - 1
"""Largest image number of a seed."""
MAX_STEPS = 250
"""Maximum number of sampler steps, unless the run's own sampler has more."""
PICTURE_SECONDS, CLEANUP_SECONDS = 600, 60
"""Seconds for which a picture is kept for the browser, and seconds between two removals of older pictures."""
MAX_QUEUED_CALLS = 16
"""Maximum number of calls that wait while another call is computed."""
MAX_CONNECTIONS = 500
"""Maximum number of simultaneous connections."""
FONT_FAMILY = ["system-ui", "sans-serif"]
"""Fonts that are installed on the user's machine, so that none is downloaded."""


@dataclass(kw_only=True, slots=True)
class PageConfig:
    """Settings of tools/page.py."""

    run: str = MISSING
    """A run folder or a bundle."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 accepts requests from every machine, for every host name."""
    port: int = 7860
    """Port to listen on, 0 to 65535 (0: any free port)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""


ConfigStore.instance().store(name="page_schema", node=PageConfig, provider="dvae")


def parse_int(name: str, value: object, least: int, most: int) -> int:
    """Check a whole number from a browser. Raises UserError if it is not an integer from `least` to `most`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name}={_shown(value)}: give a whole number from {least} to {most}")
    return value


def parse_float(name: str, value: object, least: float, most: float) -> float:
    """Check a number from a browser. Raises UserError if it is not a number from `least` to `most`."""
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise UserError(f"{name}={_shown(value)}: give a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]


def parse_choice(name: str, value: object, known: Collection[str]) -> str:
    """Check a choice from a browser. Raises UserError, with the nearest name, if it is not one of `known`."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name}={_shown(value)}: {suggest(str(value)[:40], known)}")
    return value


def _shown(value: object) -> str:
    """Format a value of any size and type in at most 40 characters."""
    return "(a huge number)" if type(value) is int and abs(value) > 10**40 else repr(value)[:40]


class PageActions:
    """The functions behind the page's buttons.

    They return pictures (H, W, 3) uint8. Image k of a seed is the same image as in tools/sample.py. The arguments come
    from a browser and are checked here. The functions raise UserError for values that the page would not send.
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
        """Generate DRAWN_IMAGES images of a seed.

        Returns a picture of the VAE's images (None if the run has none), a picture of the refined images, and a text
        with the network evaluations.
        """
        checked_seed = parse_int("seed", seed, 0, MAX_SEED)
        with self._using(sampler, steps):
            vae, refined = self.pipeline.generate(DRAWN_IMAGES, checked_seed)
        return None if vae is None else mosaic(vae, 4), mosaic(refined, 4), self._evaluations()

    def edit(
        self, seed: object, image: object, direction: object, strength: object, sampler: object, steps: object
    ) -> tuple[np.ndarray, str]:
        """Edit an image of a seed along a direction, or set one of its principal components to the strength.

        Returns a picture and a text that explains the strength. The lower row shows the image and the edited image. The
        upper row shows the VAE's images from which they were refined.
        """
        number, checked_seed = parse_int("image", image, 0, MAX_IMAGE_NUMBER), parse_int("seed", seed, 0, MAX_SEED)
        edit = self.known[parse_choice("direction", direction, self.known)]
        new = parse_float("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        z = self.pipeline.conditioning_of([number], checked_seed).z
        if isinstance(edit, int):
            present = float(self.pipeline.models.denoiser.whitening(z)[0, edit - 1])
            unit = f"before the edit, component {edit} is at {present:.2f} standard deviations"
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
        """Interpolate from one image of a seed to another.

        Returns a picture of the strip and a text with the network evaluations.
        """
        ends = parse_int("from image", first, 0, MAX_IMAGE_NUMBER), parse_int("to image", last, 0, MAX_IMAGE_NUMBER)
        checked_seed, checked_space = parse_int("seed", seed, 0, MAX_SEED), parse_choice("space", space, self.spaces)
        with self._using(sampler, steps):
            strip = self.pipeline.interpolate(*ends, checked_space, STRIP_IMAGES, checked_seed)[0]
        return mosaic(strip, STRIP_IMAGES), self._evaluations()

    def _using(self, sampler: object, steps: object) -> AbstractContextManager[None]:
        """Use a sampler and a number of steps while the block runs. The run's own sampler keeps its other fields."""
        name = parse_choice("sampler", sampler, self.samplers)
        is_own = name == SAMPLERS.name_of(self.pipeline.models.sampler)
        return self.pipeline.using(None if is_own else name, steps=parse_int("steps", steps, 1, self.most_steps))

    def _evaluations(self) -> str:
        return f"{self.pipeline.nfe:g} network evaluations per image"


def mosaic(images: torch.Tensor, columns: int) -> np.ndarray:
    """Combine images (n, C, H, W) uint8 into one picture (height, width, 3), row by row. Small images are enlarged."""
    scale = max(1, MIN_IMAGE_SIDE // images.shape[3])
    pixels = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()


def show_user_errors(action: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the page shows a UserError as a message."""

    @functools.wraps(action)
    def wrapped(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return wrapped


def picture(label: str, visible: bool = True) -> gradio.Image:
    """Create an element that shows a picture."""
    return gradio.Image(label=label, format="png", interactive=False, visible=visible, buttons=["download"])


def entry(label: str, value: int) -> gradio.Number:
    """Create an input field for a whole number."""
    return gradio.Number(value, label=label, precision=0, minimum=0)


def connect(button: gradio.Button, action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Call `action` when the button is clicked."""
    # Calls run one at a time, because a call changes the sampler of the shared pipeline. `preprocess=False` passes the
    # values as they were sent: gradio's own checks fail with a traceback if a text is sent in place of a number.
    button.click(
        show_user_errors(action), inputs, outputs, concurrency_id="pipeline", concurrency_limit=1, preprocess=False,
        api_name=action.__name__,
    )  # fmt: skip


def build(actions: PageActions, title: str) -> gradio.Blocks:
    """Build the page. Its tabs generate new images, edit one image, and interpolate between two images."""
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
                edited, unit = (
                    picture("original and edited image; above each, the image that it was refined from"),
                    gradio.Markdown(),
                )
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
    """Create the web application of the page, protected by a `Guard`."""
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
    """Open the socket that the page is served on.

    Raises UserError if the address is not valid or the port is in use.
    """
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
    """Return the host name with which a browser on this machine reaches a server that listens on `host`."""
    bare = host.strip("[]")
    if bare in EVERYWHERE:
        return "127.0.0.1"
    return f"[{bare}]" if ":" in bare else bare


@contextmanager
def own_folder() -> Iterator[None]:
    """Create PICTURE_FOLDER, readable by this user only, and remove it when the block ends."""
    PICTURE_FOLDER.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(PICTURE_FOLDER, ignore_errors=True)


def serve(settings: PageConfig) -> None:
    """Serve the page until the process is stopped.

    Raises UserError if the port is in use, or if the run draws points.
    """
    pipeline = pipelines.load(settings.run)
    configuration.refuse_points(pipeline.config, settings.run)
    vector = "encoder" in pipeline.models.trained_parts() and not pipeline.models.latent_space
    known = direction_files.load_all(bundle.find_bundle(settings.run)) if vector else {}
    title = f"{pipeline.config.recipe}: {Path(settings.run).resolve().name}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception: the folder is removed
    with listen(settings) as listener, own_folder():
        guarded = application(build(PageActions(pipeline, known), title), settings.host)
        say(f"http://{browser_host(settings.host)}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        config = uvicorn.Config(
            guarded, log_level="warning", http="h11", ws="none", lifespan="on", limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=1, server_header=False,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):  # Ctrl-C is the normal way to stop the server
            uvicorn.Server(config).run([listener])
