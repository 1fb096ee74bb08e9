"""Latents of images, and priors on them: python tools/latents.py run=runs/demo out=latents.npz"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/latents.py run=FOLDER out=NAME.npz|NAME.safetensors [split=train|heldout] [images=PLACE]
       python tools/latents.py run=FOLDER prior=NAME [prior.FIELD=VALUE] bundle=FOLDER [seed=N]
       [n=N] [resize=BOOL] [shards=FOLDER] [batch=64]

run= takes a run folder or a bundle. out= writes the posteriors q(z|x) of the images: mean and logvar, float32, in the
order of the shards; label.NAME, the number of each image's value among those in `about`, which also has the sha256 of
the weights. images= takes a folder, .zip, .npy or file of other images; resize=true brings them to the run's size.
prior= fits a prior (gmm, flow, or a preset: gmm_75, gmm_100, flow_demo) to the latents of all training images, says
what it gives the held-out ones, beside the run's own prior and N(0, I), and writes a bundle that is the run's with that
prior: python tools/sample.py run=BUNDLE draws from it."""


def command(argv: list[str]) -> None:
    """Compose the words, write latents, fit a prior, and say how it compares."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
