"""Read a public checkpoint: python tools/convert.py from=diffusevae ckpt=FILE recipe=cifar10 out=bundles/cifar10"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/convert.py from=diffusevae|psld ckpt=FILE recipe=NAME out=FOLDER [vae=FILE]
       [weights=ema|online] [dry_run=true] [refiner.heads=1] [FIELD=VALUE]

Makes a bundle of a checkpoint that the public code of DiffuseVAE or PSLD wrote; nothing in the file is executed.
recipe names the data set that it was trained on; any other field of a run can be set too. What the tensors tell takes
the place of the recipe's settings; what they cannot tell is listed, and should be checked.
vae= is a checkpoint of the VAE, where the refiner's has none in it or another is wanted."""


def command(argv: list[str]) -> None:
    """Compose the words, convert, and say what is known and what is not."""
    from dvae.models.importers import convert_checkpoint

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    print("\n".join(convert_checkpoint.convert(convert_checkpoint.compose(argv))))


if __name__ == "__main__":
    run_command(command)
