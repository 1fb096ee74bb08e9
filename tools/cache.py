"""Cache latents ahead of the refiner's training: python tools/cache.py run=runs/demo"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/cache.py run=RUN [what=posteriors|reconstructions] [draws=8] [folder=RUN/latents]

Writes what the trained encoder of a run makes of every training image into WebDataset shards: mean and logvar, or that
many draws of z with their reconstructions. The stage `cache` does the same, and takes up what lies there: train with
stages=[shards,encoder,prior,cache,refiner,evaluate], and the same cache.what, cache.draws and cache.folder."""


def command(argv: list[str]) -> None:
    """Write the cache of a run."""
    from pathlib import Path

    from dvae import config
    from dvae.run import Run
    from dvae.settings import CacheToolConfig
    from dvae.training import caching, work

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    words: CacheToolConfig = config.words_of_a_tool(config.compose("cache", argv))
    run = Run(Path(words.run))
    settings = run.config()
    settings.cache = words
    with run.held():
        made = caching.write_cache(run, settings, work.take_up(run, settings, "encoder"))
    kept = f"{made.draws} reconstructions each" if made.draws else "posteriors"
    print(f"{words.folder}: {kept} of {made.images} images")


if __name__ == "__main__":
    run_command(command)
