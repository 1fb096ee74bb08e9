from __future__ import annotations

import os
from pathlib import Path

import lightning_files
import pytest
from omegaconf import OmegaConf
from PIL import Image
from public_psld import PublicNCSNpp

from dvae.config import compose as configuration
from dvae.errors import UserError, run_command
from dvae.models.importers import convert_checkpoint
from dvae.tools import TOOLS, dispatch

WORDS = ["from=psld", "recipe=demo", "image_size=16", "refiner=ncsnpp", "process=psld", "schedule=constant"]
SAMPLER = ["sampler=em", "sampler.steps=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    network = PublicNCSNpp(6, 6, width=32, multipliers=[1], blocks=1, attended=[], side=16)
    state = lightning_files.randomize(network, 1).state_dict()
    path = tmp_path_factory.mktemp("psld") / "psld.ckpt"
    return str(lightning_files.save(path, {f"ema_score_fn.{name}": value for name, value in state.items()}))


def test_convert_then_sample(tmp_path, checkpoint, capsys):
    out = str(tmp_path / "bundle")
    # published data sets have no path of their own; a bundle needs none
    dispatch(["convert", *WORDS, *SAMPLER, "source=cifar10", f"ckpt={checkpoint}", f"out={out}"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{checkpoint}: psld, ema weights, 74 tensors in denoiser")
    assert said[-1] == f"{out}: written, a bundle for tools/sample.py run={out}"
    dispatch(["sample", f"run={out}", "n=2", f"out={tmp_path / 'samples.png'}"])
    assert "2 samples, 2 network evaluations each" in capsys.readouterr().out
    assert Image.open(tmp_path / "samples.png").size >= (32, 16)
    assert "source" not in (tmp_path / "bundle" / "config.yaml").read_text()


def test_a_refusal_is_one_line_with_status_2(tmp_path, capsys):
    bad = lightning_files.save(tmp_path / "bad.ckpt", {"ema_score_fn.all_modules.0.weight": OrderedCall()})
    with pytest.raises(SystemExit) as end:
        run_command(dispatch, ["convert", *WORDS, f"ckpt={bad}", f"out={tmp_path / 'b'}"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dvae: error: {bad}: its pickle calls 'posix.getpid'")
    assert not (tmp_path / "b").exists()


class OrderedCall:
    """Unpickles as a call."""

    def __reduce__(self):
        return os.getpid, ()


def test_a_dry_run_writes_nothing(tmp_path, checkpoint):
    words = [*WORDS, *SAMPLER, f"ckpt={checkpoint}", f"out={tmp_path / 'b'}", "dry_run=true"]
    lines = convert_checkpoint.convert(convert_checkpoint.compose(words))
    assert lines[-1] == "dry run: nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_touched(tmp_path, checkpoint):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        convert_checkpoint.convert(
            convert_checkpoint.compose([*WORDS, *SAMPLER, f"ckpt={checkpoint}", f"out={tmp_path}"])
        )
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_checkpoint_is_not_written_over(tmp_path, checkpoint):
    before = Path(checkpoint).read_bytes()
    with pytest.raises(UserError, match="is there already"):
        convert_checkpoint.convert(
            convert_checkpoint.compose([*WORDS, *SAMPLER, f"ckpt={checkpoint}", f"out={checkpoint}"])
        )
    assert Path(checkpoint).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["from=psld", "ckpt=a", "out=b"], "recipe is not set"),
        (["from=psld", "recipe=demo", "out=b"], "ckpt is not set: add ckpt=FILE"),
        (["from=psld", "recipe=demo", "ckpt=a"], "out is not set"),
        (["recipe=demo", "ckpt=a", "out=b"], "from is not set: add from=diffusevae or from=psld"),
        (["from=psdl", "recipe=demo", "ckpt=a", "out=b"], "expected one of [diffusevae, psld]"),
        (["from=psld", "recipe=demo", "wieghts=online", "ckpt=a", "out=b"], "did you mean 'weights'?"),
    ],
)
def test_wrong_words(words, said):
    with pytest.raises(UserError) as error:
        convert_checkpoint.compose(words)
    assert said in str(error.value)


def test_a_recipe_means_the_same_as_in_training():
    given = convert_checkpoint.compose(["from=psld", "recipe=faces_guided", "ckpt=a", "out=b"])
    plain = {key: value for key, value in OmegaConf.to_container(given).items() if key not in convert_checkpoint.OWN}
    assert plain == OmegaConf.to_container(configuration.compose("train", ["recipe=faces_guided"]))


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        dispatch(["convert", "--help"])
    assert end.value.code == 0
    assert "from=diffusevae" in capsys.readouterr().out
    assert "convert" in TOOLS
