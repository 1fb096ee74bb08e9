"""Compute bits per dimension of images: python tools/likelihood.py run=runs/demo n=64"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="likelihood",
    text="""Compute the likelihood of images under a run, in bits per dimension.

  python tools/likelihood.py run=runs/demo                             # 64 held-out images: likelihood.json
  python tools/likelihood.py run=runs/demo z=draw n=256                # also a bound for the whole model
  python tools/likelihood.py run=runs/demo images=faces/ resize=true out=faces.json

- The result has -log2 p(x | x_hat) per dimension for each image, by the probability flow of the refiner, in fp32. It
  also has KL(q(z|x) || N(0, I)) if the run has an encoder.
- z=mean takes x_hat of the posterior mean. z=draw takes x_hat of a draw of q(z|x), and adds the cost of z under the
  run's prior: the sum is an upper bound of the bits of the whole model.
- Runs that diffuse latents have no such likelihood, nor have runs whose schedule has zero terminal SNR.
- The same command resumes after an interruption.""",
    settings=("dvae.inference.image_likelihood:LikelihoodConfig",),
    bare="run",
    needs_words=True,
)

WORDS = {
    "bits_per_dim": "bits/dim of the refiner, given x_hat",
    "kl_nats": "KL(q(z|x) || N(0, I)), nats",
    "kl_bits_per_dim": "the same, bits/dim",
    "total_bits_per_dim": "bits/dim of the whole model, at most",
}


def command(argv: list[str]) -> None:
    """Compose the words, score the images, and print the means."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference import image_likelihood
    from dvae.utils.text_tables import aligned_lines

    settings: image_likelihood.LikelihoodConfig = compose.tool_settings(compose.compose("likelihood", argv))
    done = image_likelihood.score(settings)
    rows = [[WORDS[name], f"{mean:.4f} +- {error:.4f}"] for name, (mean, error) in done.figures.items()]
    print("\n".join(aligned_lines(rows)))
    speed = f", {done.scored} scored now at {done.images_per_second:.3g} images/s" if done.scored else ""
    evaluations = f"{done.nfe:g} network evaluations and gradients each"
    print(f"{settings.out}: {settings.n} images, {evaluations}{speed}")


if __name__ == "__main__":
    run_command(command)
