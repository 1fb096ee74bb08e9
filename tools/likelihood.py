"""Bits per dimension of images under a run: python tools/likelihood.py run=runs/demo out=likelihood.json n=64"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/likelihood.py run=FOLDER [out=likelihood.json] [n=64] [seed=0] [images=heldout|PLACE]
       [z=mean|draw] [resize=BOOL] [label=NAME] [tolerance=1e-4] [batch=N] [shards=FOLDER]

run= takes a run folder or a bundle. Writes what a lossless code of each image would need by the refiner, given x_hat of
the image: -log2 p(x | x_hat) per dimension, through the probability flow, in fp32; and KL(q(z|x) || N(0, I)) where
there is an encoder. z=draw takes x_hat of a draw of q(z|x) instead of its mean, and adds what z costs under the run's
prior: in total a bound, from above, of the bits of the whole model.
images= takes a folder, .zip, .npy or file of other images; resize=true brings them to the run's size. The same command
again goes on where it was ended. Runs that diffuse latents, and schedules without end, have no such figure."""

WORDS = {
    "bits_per_dim": "bits/dim of the refiner, given x_hat",
    "kl_nats": "KL(q(z|x) || N(0, I)), nats",
    "kl_bits_per_dim": "the same, bits/dim",
    "total_bits_per_dim": "bits/dim of the whole model, at most",
}


def command(argv: list[str]) -> None:
    """Compose the words, score the images, and print the means."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
