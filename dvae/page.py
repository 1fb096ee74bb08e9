"""The page: a trained run to play with in a browser. The only file that imports gradio."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae import bundle, directions, editing
from dvae import config as configuration
from dvae import pipeline as pipelines
from dvae.data.images import to_uint8
from dvae.errors import UserError
from dvae.noise import Between
from dvae.pipeline import Pipeline
from dvae.registry import SAMPLERS
from dvae.registry.samplers import that_integrate
from dvae.tracking.console import say

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported

try:
    import gradio
except ImportError:
    raise UserError("the page needs gradio, which is not installed: pip install 'dvae[page]'") from None

SHOWN = 16
"""Images that are drawn together."""
SIDE = 128
"""Pixels that an image is at least wide on the page."""
STRIP = 8
"""Images of an interpolation."""
STRENGTH = 4.0
"""Greatest strength of the slider, either way."""
FAMILY = ["system-ui", "sans-serif"]
"""Fonts of the reader's machine: none is fetched."""


@dataclass(kw_only=True, slots=True)
class PageConfig:
    """What tools/page.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    host: str = "127.0.0.1"
    """Address that it listens on; 0.0.0.0 lets other machines in, whoever they are."""
    port: int = 7860
    """Port that it listens on."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="page_schema", node=PageConfig, provider="dvae")


class Player:
    """What the page shows, as pictures (H, W, 3) uint8; image k of a seed is that of tools/sample.py."""

    def __init__(self, pipeline: Pipeline, known: dict[str, directions.Direction]) -> None:
        denoiser, own = pipeline.models.denoiser, SAMPLERS.name_of(pipeline.models.sampler)
        self.pipeline = pipeline
        self.known: dict[str, directions.Direction | int] = {**known}
        self.known |= {f"component {k}": k for k in range(1, denoiser.config.pca_components + 1)}
        self.samplers = sorted({own, *that_integrate(denoiser.diffusion, denoiser.io)})

    def draw(self, seed: float, sampler: str, steps: float) -> tuple[np.ndarray | None, np.ndarray, str]:
        """SHOWN images of a seed: before refinement, where there is such a thing, and refined; and what they took."""
        with self._using(sampler, steps):
            vae, refined = self.pipeline.generate(SHOWN, int(seed))
        return None if vae is None else mosaic(vae, 4), mosaic(refined, 4), self._took()

    def edit(
        self, seed: float, number: float, direction: str, strength: float, sampler: str, steps: float
    ) -> tuple[np.ndarray, str]:
        """An image of a seed beside itself moved along a direction, or with a principal component put at the strength;
        above them what they were refined from."""
        along, given = self.known[direction], self.pipeline.drawn_for([int(number)], int(seed))
        if isinstance(along, int):
            own = float(self.pipeline.models.denoiser.whitening(given.z)[0, along - 1])
            unit = f"as it is, component {along} stands at {own:.2f} standard deviations"
        else:
            own, unit = 0.0, f"strength 1: {along.unit}"
        strengths = [own, float(strength)]
        z = editing.along(self.pipeline, along)(given.z.repeat_interleave(2, 0), torch.tensor(strengths).to(given.z))
        with self._using(sampler, steps):
            refined = self.pipeline.edit([int(number)], along, strengths, int(seed))[0]
        return mosaic(torch.cat([to_uint8(self.pipeline.decode(z)).cpu(), refined]), 2), unit

    def interpolate(
        self, seed: float, first: float, last: float, space: str, sampler: str, steps: float
    ) -> tuple[np.ndarray, str]:
        """A strip from one image of a seed to another."""
        with self._using(sampler, steps):
            strip = self.pipeline.interpolate(int(first), int(last), space, STRIP, int(seed))[0]
        return mosaic(strip, STRIP), self._took()

    def _using(self, sampler: str, steps: float) -> AbstractContextManager[None]:
        """The run's own sampler keeps its other fields."""
        own = SAMPLERS.name_of(self.pipeline.models.sampler)
        return self.pipeline.using(None if sampler == own else sampler, steps=int(steps))

    def _took(self) -> str:
        return f"{self.pipeline.nfe:g} network evaluations per image"


def mosaic(images: torch.Tensor, columns: int) -> np.ndarray:
    """Images (n, C, H, W) uint8 as one picture (height, width, 3), row by row, enlarged where they are small."""
    scale = max(1, SIDE // images.shape[3])
    pixels = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = [torch.cat(list(row), 2) for row in pixels.split(columns)]
    return torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()


def told(act: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but what the user can mend is told on the page."""

    def acted(*values: Any) -> Any:
        try:
            return act(*values)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return acted


def build(player: Player, title: str) -> gradio.Blocks:
    """The page: new images, one image edited, the way between two."""
    own = player.pipeline.models.sampler
    drawn, latent = player.pipeline.models.generates, player.pipeline.models.latent_space

    def picture(label: str, visible: bool = True) -> gradio.Image:
        return gradio.Image(label=label, format="png", interactive=False, visible=visible, buttons=["download"])

    def number(label: str, value: int) -> gradio.Number:
        return gradio.Number(value, label=label, precision=0, minimum=0)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            seed = number("seed", 0)
            sampler = gradio.Dropdown(player.samplers, value=SAMPLERS.name_of(own), label="sampler")
            steps = gradio.Slider(1, 250, value=own.config.steps, step=1, label="steps")

        def acts(button: gradio.Button, act: Callable[..., Any], given: list[Any], shown: list[Any]) -> None:
            # one at a time: the sampler that a call uses is the pipeline's
            button.click(told(act), given, shown, concurrency_id="pipeline", concurrency_limit=1)

        with gradio.Tab("Draw"):
            button = gradio.Button("Draw images", variant="primary")
            with gradio.Row():
                generated, refined = picture("before refinement", visible=drawn), picture("refined")
            said = gradio.Markdown()
            acts(button, player.draw, [seed, sampler, steps], [generated, refined, said])
        if player.known and not latent:
            with gradio.Tab("Edit"):
                with gradio.Row():
                    image = number("image of the seed", 0)
                    direction = gradio.Dropdown(list(player.known), label="direction")
                    strength = gradio.Slider(-STRENGTH, STRENGTH, value=1.0, step=0.25, label="strength")
                button = gradio.Button("Edit the image", variant="primary")
                edited, unit = picture("as it is, and edited; above, what each was refined from"), gradio.Markdown()
                acts(button, player.edit, [seed, image, direction, strength, sampler, steps], [edited, unit])
        with gradio.Tab("Interpolate"):
            spaces = [each.name for each in Between] if drawn else [Between.noise.name]
            with gradio.Row():
                first, last = number("from image", 0), number("to image", 1)
                space = gradio.Dropdown(spaces, value=spaces[-1], label="what changes")
            button = gradio.Button("Draw the strip", variant="primary")
            strip, said = picture("from one to the other"), gradio.Markdown()
            acts(button, player.interpolate, [seed, first, last, space, sampler, steps], [strip, said])
    return page


def serve(settings: PageConfig) -> None:
    """Serve the page until the process is ended. Raises UserError where the port is taken, or the run draws points."""
    pipeline = pipelines.load(settings.run)
    configuration.refuse_points(pipeline.config, settings.run)
    vector = "encoder" in pipeline.models.trained() and not pipeline.models.latent_space
    known = directions.store.load_all(bundle.folder_of(settings.run)) if vector else {}
    name = Path(settings.run).resolve().name
    page = build(Player(pipeline, known), f"{pipeline.config.recipe}: {name}")
    try:
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            theme=gradio.themes.Default(font=FAMILY, font_mono=["monospace"]),
        )
    except OSError:
        raise UserError(f"port={settings.port} is taken: use another port=") from None
    say(f"http://{settings.host}:{settings.port} (Ctrl-C ends it)")
    page.block_thread()
