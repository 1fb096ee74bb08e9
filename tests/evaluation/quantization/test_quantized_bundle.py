"""A quantized bundle is a bundle: smaller on disk and in memory, near the original, refused where it does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests_support import reseal

import dvae
from dvae.config import compose
from dvae.errors import UserError
from dvae.evaluation.quantization import compare, quantize_bundle
from dvae.evaluation.quantization.quantize_settings import QuantizeConfig
from dvae.models import bundle, bundle_export, bundle_reuse, components
from dvae.models.quantization import layer_plan
from dvae.models.quantization.integer_layer import IntegerLayer
from dvae.models.quantization.layer_plan import QuantizationMethod
from dvae.stages.evaluate import psnr
from dvae.tools import quantize as tool

DIT = ["refiner=dit", "refiner.width=64", "refiner.depth=2", "refiner.heads=2", "refiner.patch=4"]


def exported(folder: Path, words: list[str]) -> Path:
    """The bundle of a run that was never trained."""
    composed = compose.compose("train", [*words, "denoiser.data_scale=1"])
    made = components.build_models(compose.to_run_config(composed))
    with torch.no_grad():
        for parameter in made.denoiser.refiner.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    bundle_export.export(
        folder,
        compose.to_run_config(composed),
        {name: part.state_dict() for name, part in made.trained_parts().items()},
    )
    return folder


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> list[str]:
    return [word for word in tiny if not word.startswith("refiner.multipliers")] + ["refiner.multipliers=[1,2]"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    return exported(tmp_path_factory.mktemp("quantize") / "original", words)


@pytest.fixture(scope="module")
def quantized(original: Path) -> dict[QuantizationMethod, Path]:
    """A bundle by each method."""
    made = {}
    for method in QuantizationMethod:
        out = original.parent / method.name
        quantize_bundle.write_quantized(
            QuantizeConfig(run=str(original), method=method, out=str(out), calibration=16), original, out
        )
        made[method] = out
    return made


@pytest.fixture
def copy(quantized: dict[QuantizationMethod, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the bundle by a method, with quantization.json changed."""

    def make(
        method: QuantizationMethod = QuantizationMethod.int8_weights,
        change: Callable[[dict], None] = lambda record: None,
    ) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(quantized[method], folder)
        record = json.loads((folder / layer_plan.FILE).read_text())
        change(record)
        (folder / layer_plan.FILE).write_text(json.dumps(record))
        reseal(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("method", "least"),
    [(QuantizationMethod.int8_weights, 38.0), (QuantizationMethod.int8, 30.0), (QuantizationMethod.int4_weights, 20.0)],
)
def test_images_are_near_the_original(
    quantized: dict[QuantizationMethod, Path], original: Path, method: QuantizationMethod, least: float
) -> None:
    (vae, wanted), (also_vae, found) = (dvae.load(path).generate(20, seed=3) for path in (original, quantized[method]))
    assert not torch.equal(found, wanted)
    assert psnr(wanted, found).min() > least
    assert psnr(vae, also_vae).min() > min(least, 40.0)


@pytest.mark.parametrize("method", list(QuantizationMethod))
def test_weights_lie_in_as_few_bytes_as_is_said(
    quantized: dict[QuantizationMethod, Path], original: Path, method: QuantizationMethod
) -> None:
    said = json.loads((quantized[method] / layer_plan.FILE).read_text())
    before, after = (bundle.load(path)[1] for path in (original, quantized[method]))
    stores = dict.fromkeys(("bf16", "int8", "int4", "integer"), 0)
    for part, layers in said["layers"].items():
        module = before.trained_parts()[part]
        for store, names in layers.items():
            stores[store] += sum(module.get_submodule(name).weight.numel() for name in names)
    figures = sum(value.nbytes for value in before.prior.state_dict().values())
    whole, held = layer_plan.memory_bytes(before), layer_plan.memory_bytes(after)
    least = figures + 2 * stores["bf16"] + stores["int8"] + stores["integer"] + stores["int4"] // 2
    rest = (whole - figures) // 4 - sum(stores.values())  # numbers that no stored layer holds as its weight
    assert least < held <= least + 4 * rest + 0.08 * whole
    assert stores["bf16"] > 0
    assert sum(stores.values()) - stores["bf16"] > 0.6 * (whole - figures) / 4
    disk, fp32 = ((path / bundle.WEIGHTS).stat().st_size for path in (quantized[method], original))
    assert disk < held + 45_000 < fp32  # names and shapes are a few dozen kilobytes
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in after.denoiser.named_buffers()}
    assert kinds["scales"] == torch.bfloat16
    if method is QuantizationMethod.int8_weights:
        layer = after.denoiser.get_submodule(said["layers"]["denoiser"]["int8"][0])
        assert layer.codes.dtype == torch.int8


def test_a_transformer_is_a_bundle_too(tmp_path: Path, tiny: list[str]) -> None:
    words = [word for word in tiny if not word.startswith("refiner.")] + DIT
    run = exported(tmp_path / "dit", words)
    for method in (QuantizationMethod.int8_weights, QuantizationMethod.int8):
        out = tmp_path / method.name
        made = quantize_bundle.write_quantized(
            QuantizeConfig(run=str(run), method=method, out=str(out), calibration=16), run, out
        )
        assert len(made.layers["denoiser"]["bf16"]) == 4
        images = [dvae.load(path).generate(8, seed=1)[1] for path in (run, out)]
        assert psnr(*images).min() > 30


def test_int8_is_for_cpus_and_has_no_likelihood(quantized: dict[QuantizationMethod, Path]) -> None:
    pipeline = dvae.load(quantized[QuantizationMethod.int8])
    assert pipeline.device.type == "cpu"
    assert any(isinstance(layer, IntegerLayer) for layer in pipeline.models.denoiser.modules())
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="no gradients: use the original"):
        pipeline.bits_per_dim(black, seed=0)
    with pytest.raises(UserError, match="kernels are for CPUs: leave device=cuda out"):
        dvae.load(quantized[QuantizationMethod.int8], device="cuda")
    assert dvae.load(quantized[QuantizationMethod.int8_weights]).bits_per_dim(black, seed=0, tolerance=0.1).isfinite()


def restore(record: dict, store: str) -> None:
    """Say of the encoder's int8 layers that they are stored in another way."""
    record["layers"]["encoder"][store] = record["layers"]["encoder"].pop("int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(method="int7"), "unknown method 'int7': .*known: int4_weights, int8, int8_weights"),
        (lambda r: r.update(method="int8"), "says method int8, bundle.json int8_weights: quantize the run again"),
        (lambda r: r["layers"]["denoiser"]["int8"].append("refiner.nowhere"), "names 'refiner.nowhere', which is no"),
        (lambda r: r["layers"]["denoiser"]["int8"].pop(), "the weights hold .*codes"),
        (lambda r: r["layers"]["encoder"].update(int7=[]), "unknown store 'int7'"),
        (lambda r: r["layers"].pop("encoder"), "its quantized parts are denoiser, the config has denoiser, encoder"),
        (lambda r: restore(r, "int4"), "in the weights and"),
        (lambda r: restore(r, "bf16"), "is torch.int8 in the weights, torch.bfloat16 by the config"),
        (lambda r: r.update(group="32"), "group: Input should be a valid integer: not a readable plan"),
        (lambda r: r.update(surplus=1), "not a readable plan"),
        (lambda r: r.pop("layers"), "not a readable plan"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(
    copy: Callable[..., Path], change: Callable[[dict], None], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        dvae.load(copy(change=change))
    assert "\n" not in str(refused.value)


def test_a_damaged_bundle_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    weights = folder / bundle.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="reaches beyond the file: it is cut off"):
        dvae.load(folder)
    reseal(folder)  # even if it was written so
    with pytest.raises(UserError, match="reaches beyond the file: it is cut off"):
        dvae.load(folder)
    weights.write_bytes(whole)
    reseal(folder)
    (folder / layer_plan.FILE).write_text("{")
    with pytest.raises(UserError, match=r"quantization.json does not match the hash in bundle.json"):
        dvae.load(folder)
    reseal(folder)
    with pytest.raises(UserError, match="not a readable plan"):
        dvae.load(folder)
    (folder / layer_plan.FILE).unlink()
    with pytest.raises(UserError, match=r"not a whole bundle \(quantization.json is missing\)"):
        dvae.load(folder)


def test_nothing_is_trained_from_a_quantized_bundle(
    quantized: dict[QuantizationMethod, Path], words: list[str]
) -> None:
    folder = quantized[QuantizationMethod.int8_weights]
    run = compose.to_run_config(compose.compose("train", [*words, f"encoder_weights={folder}"]))
    with pytest.raises(UserError, match=r"is quantized \(int8_weights\): name the bundle from which it was made"):
        bundle_reuse.load_encoder_weights(str(folder), run)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ({"group": 33}, "group=33: use an even number"),
        ({"buckets": 0}, "buckets=0: use 1 or more"),
        ({"n": 50}, "kid_subset_size=100 is more than n=50"),
        ({"budget": -1.0}, "budget=-1: use 0 or more"),
        ({"n": 100, "shards": "nowhere"}, "nowhere"),
    ],
)
def test_words_out_of_range_are_refused(original: Path, tmp_path: Path, word: dict[str, object], message: str) -> None:
    asked = QuantizeConfig(run=str(original), method=QuantizationMethod.int8_weights, out=str(tmp_path / "out"), **word)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        quantize_bundle.quantize(asked)
    assert not (tmp_path / "out").exists()


def test_the_tool_quantizes_measures_and_refuses_to_do_it_twice(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = [f"run={original}", "method=int8_weights", f"out={out}", "rounds=2"]
    tool.command(asked)
    measured = json.loads((out / layer_plan.FILE).read_text())["measured"]
    disk = sum(path.stat().st_size for path in out.iterdir())
    assert measured["bytes"]["disk"]["quantized"] == pytest.approx(disk, abs=4)
    assert measured["speed"]["nfe"] == 2
    assert set(measured) == {"speed", "bytes", "faster", "why"}
    shown = capsys.readouterr().out
    assert "int8_weights, layers: 6 bf16" in shown
    assert "not offered for speed: " in shown  # KID was not measured, whatever the speed was
    with pytest.raises(UserError, match="is there already"):
        tool.command(asked)
    with pytest.raises(UserError, match=r"is quantized .* name the bundle from which it was made"):
        tool.command([f"run={out}", "method=int8", f"out={tmp_path / 'again'}"])


def measured(quartiles: list[float], kid: float | None) -> dict:
    found: dict = {"speed": {"ratio": {"median": sum(quartiles) / 2, "quartiles": quartiles}}}
    return found if kid is None else found | {"kid": {"ratio": kid}}


@pytest.mark.parametrize(
    ("found", "faster", "why"),
    [
        ({}, False, "speed was not measured"),
        (measured([0.9, 1.3], 1.0), False, "not faster on this machine"),
        (measured([1.1, 1.3], None), False, "its KID was not measured"),
        (measured([1.1, 1.3], 1.06), False, "more than the budget of 5%"),
        (measured([1.1, 1.3], 1.04), True, "1.20 times the original's speed .* within the budget of 5%"),
    ],
)
def test_only_what_was_measured_is_called_faster(found: dict, faster: bool, why: str) -> None:
    said = compare.summary(found, 0.05)
    assert said["faster"] is faster
    assert re.search(why, said["why"])
