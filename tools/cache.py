"""Cache latents ahead of the refiner's training: python tools/cache.py run=runs/demo"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/cache.py run=RUN [contents=posteriors|reconstructions] [draws=8] [folder=RUN/latents]
                                    [part=0 parts=4] [shards=PLACE] [plugins=[MODULE]]

Writes what the trained encoder of a run makes of every training image into WebDataset shards: mean and logvar, or that
many draws of z with their reconstructions. The stage `cache` does the same, and takes up what lies there: train with
stages=[shards,encoder,prior,cache,refiner,evaluate], and the same cache.contents, cache.draws and cache.folder.
Stopped, the same command again goes on after the last finished shard. With part= and parts=, only the first (0, ..., 3)
of 4 parts is made, beside others, on machines that share the folder's place; when all have ended, the same command
without them, or the stage, makes what is missing and publishes."""


def command(argv: list[str]) -> None:
    """Write the cache of a run."""
    from pathlib import Path

    from dvae.config import compose
    from dvae.data.building import shard_request
    from dvae.data.latent_cache import FILE
    from dvae.models import components
    from dvae.registry.stages.base import with_settings
    from dvae.runs.folder import Run
    from dvae.stages import cache
    from dvae.stages.run_models import load_models

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    words: cache.CacheToolConfig = compose.tool_settings(compose.compose("cache", argv))
    shard_request.check_part(words.part, words.parts)
    run = Run(Path(words.run))
    settings = run.config()
    components.build_models_on_meta(
        settings
    )  # the settings may be a stranger's: their size is checked before memory is taken
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
