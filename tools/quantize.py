"""Quantize a bundle: python tools/quantize.py run=runs/demo method=int8_weights out=bundles/demo-int8"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="quantize",
    text="""Quantize the networks of a run into a smaller bundle, and compare it with the original.

  python tools/quantize.py run=runs/demo method=int8_weights out=bundles/int8           # smaller, same arithmetic
  python tools/quantize.py run=runs/demo method=int4_weights group=64 out=bundles/int4  # smaller still
  python tools/quantize.py run=runs/demo method=int8 n=500 out=bundles/int8-act         # also compare KID

method= is one of:
  int8_weights     weights as int8, with a scale for each output channel; computes as before
  int4_weights     weights as int4, with a scale for each `group` inputs; computes as before
  int8             the refiner's activations are int8, too; runs on CPUs only, without gradients (oneDNN's kernels)

- Every command that takes a run also takes the bundle. Its file quantization.json says how each layer is stored, and
  what was measured: docs/quantization.md.
- Original and quantized networks take turns when their speed is measured. The bundle is called faster only if it was
  faster than the original in bf16, and KID grew by no more than `budget`.""",
    settings=("dvae.evaluation.quantization.quantize_settings:QuantizeConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, quantize, and print the figures."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.evaluation.quantization import quantize_bundle
    from dvae.evaluation.quantization.quantize_settings import QuantizeConfig

    settings: QuantizeConfig = compose.tool_settings(compose.compose("quantize", argv))
    made = quantize_bundle.quantize(settings)
    counts: dict[str, int] = {}
    for stores in made.layers.values():
        for store, names in stores.items():
            counts[store] = counts.get(store, 0) + len(names)
    print(f"{settings.out}: {made.method}, layers: " + ", ".join(f"{many} {store}" for store, many in counts.items()))
    for name, of in made.measured["bytes"].items():
        print(f"{name.replace('_', ' ')}: {of['original']} -> {of['quantized']} bytes, {of['ratio']:.3f}")
    if speed := made.measured.get("speed"):
        rates = speed["images_per_second"]
        print(f"images/s: original {rates['original']:g}, quantized {rates['quantized']:g}, nfe {speed['nfe']:g}")
    if kid := made.measured.get("kid"):
        print(
            f"KID-lite0: original {kid['original']['mean']:.5f}, quantized {kid['quantized']['mean']:.5f}, "
            f"floor {kid['floor']:.5f}; PSNR of one against the other {kid['psnr']:.1f} dB"
        )
    print(("faster: " if made.measured["faster"] else "not offered for speed: ") + made.measured["why"])


if __name__ == "__main__":
    run_command(command)
