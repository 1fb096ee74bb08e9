"""Convert a public checkpoint: python tools/convert.py from=psld ckpt=FILE recipe=cifar10 out=FOLDER"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="convert",
    text="""Convert a checkpoint of the public DiffuseVAE or PSLD code into a bundle.

  python tools/convert.py from=diffusevae ckpt=ddpm.ckpt recipe=cifar10 out=bundles/cifar10
  python tools/convert.py from=diffusevae ckpt=ddpm.ckpt vae=vae.ckpt recipe=cifar10 out=bundles/cifar10
  python tools/convert.py from=psld ckpt=psld.ckpt recipe=psld_cifar10 out=bundles/psld weights=online
  python tools/convert.py from=psld ckpt=psld.ckpt recipe=psld_cifar10 out=bundles/psld dry_run=true   # write nothing

- recipe= names the recipe of the data set that the checkpoint was trained on. Every other setting of a run can be set
  too, such as refiner.heads=1.
- Settings that follow from the tensors replace those of the recipe. The command lists the settings that the tensors do
  not determine: check them.
- The checkpoint is read as data. No code in the file is executed: docs/importing.md.""",
    settings=("dvae.models.importers.convert_checkpoint:ConvertConfig",),
    bare="ckpt",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, convert, and say what is known and what is not."""
    argv = ABOUT.arguments(argv)
    from dvae.models.importers import convert_checkpoint

    print("\n".join(convert_checkpoint.convert(convert_checkpoint.compose(argv))))


if __name__ == "__main__":
    run_command(command)
