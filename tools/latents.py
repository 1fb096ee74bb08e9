"""Write latents of images, fit a prior to them: python tools/latents.py run=runs/demo out=latents.npz"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="latents",
    text="""Write the latents of images into a file, or fit a prior to them.

  python tools/latents.py run=runs/demo out=latents.npz                        # of the training images
  python tools/latents.py run=runs/demo out=own.safetensors images=faces/ resize=true
  python tools/latents.py run=runs/demo prior=flow_demo bundle=bundles/flow    # a bundle with another prior
  python tools/latents.py run=runs/demo prior=gmm prior.components=5 bundle=bundles/gmm

- The file holds the posterior q(z|x) of each image: mean and logvar, float32, in the order of the shards. label.NAME is
  the number of each image's value of the attribute NAME, and -1 if it has none. `about` holds the values, and the
  sha256 of the weights.
- prior= takes gmm, flow, or a preset (gmm_demo, gmm_75, gmm_100, flow_demo). The prior is fitted to the latents of all
  training images. The command compares it on held-out images with the run's own prior and with N(0, I).
- `python tools/sample.py run=BUNDLE` then draws from the fitted prior.""",
    settings=("dvae.inference.latents:LatentsConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, write latents, fit a prior, and say how it compares."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference import latents
    from dvae.utils.text_tables import aligned_lines

    settings: latents.LatentsConfig = compose.tool_settings(compose.compose("latents", argv))
    written, fitted = latents.run(settings)
    if written:
        print(f"{settings.out}: posteriors of {written} images")
    if fitted is None:
        return
    figures = ", ".join(f"{name} {value:.6g}" for name, value in fitted.figures.items())
    print(f"fitted to {fitted.images} images: {figures or 'nothing to fit'}")
    print(f"log-likelihood of {fitted.heldout} held-out images' latents, nats per dimension (more is better)")
    rows = [["", "draws of q(z|x)", "means of q(z|x)"]]
    for one in fitted.table:
        rows.append([one.name, *(f"{mean:.4f} +- {error:.4f}" for mean, error in (one.draws, one.means))])
    print("\n".join(aligned_lines(rows)))
    print(settings.bundle)


if __name__ == "__main__":
    run_command(command)
