"""Draw images: python tools/sample.py run=runs/demo n=64 seed=0 out=samples.png [sampler=ddim] [sampler.steps=50]"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/sample.py run=FOLDER [n=64] [seed=0] [first=0] [out=samples.png] [vae=BOOL] [processes=1]
       [sampler=NAME] [sampler.FIELD=VALUE] [label=NAME] [guidance=1] [label_guidance=1] [pca_guidance=1]
       [classifier_guidance=0]
       [batch=N] [shared=z|noise] [intermediate=0]

run= takes a run folder or a bundle. out= names the form: NAME.png one picture, each VAE sample, where there is a VAE,
with its refined sample at its right; NAME/ a folder of 000000.png, ...; NAME.npy uint8 (n, H, W, C); NAME.zip and
NAME.tar (WebDataset) of PNGs. vae=true puts the VAE's samples there too. The same command again goes on where it was
ended. Image k of a seed has the same bits on the CPU, however many are drawn, from whichever `first`, by however many
processes; with batch=, which may be faster, a pixel may be off by one gray level in fp32, by a few in bf16.
sampler.FIELD changes the run's own sampler or the one that sampler= names; sampler.temperature scales the starting
noise.
guidance weighs x_hat, z and class together, label_guidance the class alone (0 without, 1 as trained, above 1 stronger);
classifier_guidance is the factor on the gradient of the run's classifier. label is one of the run's classes.
shared=z gives all images z and class of image 0 of the seed, so that only the noise varies; shared=noise gives all its
noise. intermediate=N puts N denoised estimates, from evenly spread steps, at the left of each image."""


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("sample", own_sampler(argv)))
    done = generate_to_file(settings)
    print(f"{settings.out}: {done.n} samples, {done}")


def own_sampler(words: list[str]) -> list[str]:
    """The words, with sampler.FIELD=VALUE as Hydra wants it where no sampler is named: fields of the run's own."""
    if any(word.startswith("sampler=") for word in words):
        return words
    return [f"+{word}" if word.startswith("sampler.") else word for word in words]


if __name__ == "__main__":
    run_command(command)
