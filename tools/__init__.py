"""Thin commands; what they do lives in dvae/. `dvae <tool> ...` is `python tools/<tool>.py ...`."""

from __future__ import annotations

import importlib
import sys

from dvae.errors import UserError, run_command, suggest
from dvae.utils.package import VERSION

TOOLS = {
    "launch": "train a recipe: dvae launch recipe=demo",
    "plan": "predict memory, time and GPU-days of a recipe on GPUs that are not here",
    "runs": "list runs, follow, cancel or resume one",
    "sweep": "try settings: a W&B sweep file, without a server",
    "shards": "build or verify WebDataset shards",
    "cache": "write the latents of a run's training images into shards",
    "sample": "draw images from a trained run",
    "reconstruct": "encode, decode and refine images",
    "interpolate": "go from image to image in z, in the noise, or in both",
    "edit": "move images along a direction of the latent space",
    "inpaint": "keep a part of images, and draw the rest anew",
    "likelihood": "score images in bits per dimension",
    "latents": "write the latents of images, fit a prior to them",
    "export": "make a bundle of a checkpoint",
    "ema": "make an average of any width from the snapshots of a training",
    "quantize": "make a bundle of fewer bytes, and measure what that costs",
    "evaluate": "score samples by FID, KID, IS, precision and recall; studies of them",
    "directions": "find, keep and score directions of the latent space",
    "study": "compare arms of training with several seeds, beside the VAE alone",
    "page": "play with a trained run in a browser",
    "recognize": "count the classes that samples show, by a classifier trained on the real images",
    "replay": "take a training step that was not finite once more, and look at it",
    "convert": "read a public checkpoint of DiffuseVAE or PSLD",
    "bench": "measure how fast images come, what the trainer costs, how far the planner is off",
    "gallery": "draw process x sampler x evaluations, from runs on points",
    "components": "list what is registered",
}


def dispatch(argv: list[str]) -> None:
    """Run the tool that the first word names with the words after it."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dvae TOOL [key=value ...]\n")
        print("\n".join(f"  {name:<12}{about}" for name, about in TOOLS.items()))
        print("\n`dvae TOOL --help` tells more.")
        return
    if argv[0] == "--version":
        print(f"dvae {VERSION}")
        return
    if argv[0] not in TOOLS:
        raise UserError(f"unknown tool {argv[0]!r}: {suggest(argv[0], TOOLS)}")
    importlib.import_module(f"dvae.tools.{argv[0]}").command(argv[1:])


def main() -> None:
    """The console command `dvae`."""
    run_command(dispatch, sys.argv[1:])
