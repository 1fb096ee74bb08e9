"""Cache latents before the refiner is trained: python tools/cache.py run=runs/demo"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="cache",
    text="""Encode the training images of a run, and write the latents into shards for the refiner's training.

  python tools/cache.py run=runs/demo                                     # mean and logvar of each image
  python tools/cache.py run=runs/demo contents=reconstructions draws=8    # draws of z, and their decoded images
  python tools/cache.py run=runs/demo part=0 parts=4                      # the first quarter, on one of four machines

- If the command is interrupted, the same command resumes after the last finished shard.
- The stage `cache` does the same within a training, and uses a cache that exists already. Train with
  stages=[shards,encoder,prior,cache,refiner,evaluate] and the same cache.contents, cache.draws and cache.folder.
- Machines that make parts must share the folder. When all parts are made, run the command without part= and parts=:
  it makes the parts that are missing, and publishes the cache. The stage `cache` does this too.""",
    settings=("dvae.stages.cache:CacheToolConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Write the cache of a run."""
    argv = ABOUT.arguments(argv)
    from pathlib import Path

    from dvae.config import compose
    from dvae.data.building import shard_request
    from dvae.data.latent_cache import FILE
    from dvae.models import components
    from dvae.registry.stages.base import with_settings
    from dvae.runs.folder import Run
    from dvae.stages import cache
    from dvae.stages.run_models import load_models

    words: cache.CacheToolConfig = compose.tool_settings(compose.compose("cache", argv))
    shard_request.check_part(words.part, words.parts)
    run = Run(Path(words.run))
    settings = run.config()
    components.build_models_on_meta(settings)  # checks the size of a stranger's settings before memory is taken
    settings = with_settings(settings, cache.CacheStage.Config(cache=words))
    if words.shards:
        settings.data.shards = words.shards
    if words.part is not None:
        made = load_models(run, settings, "encoder")
        images = cache.write_cache_part(run, settings, made, words.part, words.parts)
        print(f"{words.folder}: part={words.part} parts={words.parts} has {images} images, all made")
        if not (Path(words.folder) / FILE).exists():
            print("  when all parts are made: the same command without part= and parts= publishes the cache")
        return
    with run.held():
        about = cache.write_cache(run, settings, load_models(run, settings, "encoder"))
    kept = f"{about.draws} reconstructions each" if about.draws else "posteriors"
    print(f"{words.folder}: {kept} of {about.images} images")


if __name__ == "__main__":
    run_command(command)
