"""Draw images: python tools/sample.py run=runs/demo n=64 seed=0 out=samples.png [sampler=ddim sampler.steps=50]"""

from __future__ import annotations

from dvae.errors import UserError, run_command

USAGE = """usage: python tools/sample.py run=FOLDER [n=64] [seed=0] [out=samples.png] [sampler=NAME sampler.FIELD=VALUE]
       [label=NAME] [guidance=1] [label_guidance=1] [classifier_guidance=0]

run= takes a run folder or a bundle. Writes one picture: each VAE sample, where there is a VAE, with its refined sample
at its right.
guidance weighs x_hat, z and class together, label_guidance the class alone (0 without, 1 as trained, above 1 stronger);
classifier_guidance is the factor on the gradient of the run's classifier. label is one of the run's classes."""


def command(argv: list[str]) -> None:
    """Load the run, draw n images, write the picture."""
    from pathlib import Path

    import torch

    from dvae import config, pipeline
    from dvae.guidance import Guidance
    from dvae.tracking import pictures

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    words = config.compose("sample", argv)
    if int(words.n) < 1:
        raise UserError(f"n={words.n}: use 1 or more")
    loaded = pipeline.load(str(words.run))
    if config.endless(loaded.config):
        raise UserError(f"run={words.run} draws points, not images: use python tools/gallery.py runs={words.run}")
    if words.sampler is not None:
        loaded.use_sampler(words.sampler)
    guidance = Guidance(condition=words.guidance, label=words.label_guidance, classifier=words.classifier_guidance)
    label = loaded.class_number(words.label) if words.label else None
    vae, refined = loaded.generate(int(words.n), int(words.seed), label=label, guidance=guidance)
    shown = [refined] if vae is None else [vae, refined]
    pictures.grid(torch.stack(shown, 1).flatten(0, 1), Path(str(words.out)))
    print(f"{words.out}: {words.n} samples, {loaded.nfe:g} network evaluations each")


if __name__ == "__main__":
    run_command(command)
