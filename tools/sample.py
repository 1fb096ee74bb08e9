"""Draw images: python tools/sample.py run=runs/demo n=64 seed=0 out=samples.png [sampler=ddim sampler.steps=50]"""

from __future__ import annotations

from dvae.errors import UserError, run_command

USAGE = """usage: python tools/sample.py run=FOLDER [n=64] [seed=0] [out=samples.png] [sampler=NAME sampler.FIELD=VALUE]

run= takes a run folder or a bundle. Writes one picture: each VAE sample with its refined sample at its right."""


def command(argv: list[str]) -> None:
    """Load the run, draw n images, write the picture."""
    from pathlib import Path

    import torch

    from dvae import config, pipeline
    from dvae.tracking import pictures

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    words = config.compose("sample", argv)
    if int(words.n) < 1:
        raise UserError(f"n={words.n}: use 1 or more")
    loaded = pipeline.load(str(words.run))
    if "sampler" in words:
        loaded.use_sampler(words.sampler)
    vae, refined = loaded.generate(int(words.n), int(words.seed))
    pictures.grid(torch.stack([vae, refined], 1).flatten(0, 1), Path(str(words.out)))
    print(f"{words.out}: {words.n} samples, {loaded.nfe} network evaluations each")


if __name__ == "__main__":
    run_command(command)
