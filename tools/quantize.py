"""A bundle of fewer bytes: python tools/quantize.py run=runs/demo method=int8_weights out=bundles/demo-int8"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/quantize.py run=FOLDER method=int8_weights|int8|int4_weights out=BUNDLE
       [rounds=5] [n=0] [seeds=3] [steps=0] [shards=FOLDER] [kid_subset_size=100] [budget=0.05] [seed=0]
       [group=32] [buckets=4] [calibration=64]

Quantizes the networks of a run or bundle after training. out= is a bundle like any other, for tools/sample.py and all
else that takes a run; quantization.json in it says which layers were stored how, and what was measured.
int8_weights keeps weights as int8 with a scale per output channel, int4_weights as int4 with a scale per `group`
inputs; both compute as before. int8 makes the refiner's activations int8 too, scaled by what `calibration` images show
in each of `buckets` parts of the time, and multiplies with oneDNN's int8 kernels: on CPUs, without gradients.
Original and quantized then take turns in `rounds` rounds, and with n= are compared by KID on real images. The bundle is
offered for speed only if it was faster than the original in bf16 and KID grew by no more than `budget`."""


def command(argv: list[str]) -> None:
    """Compose the words, quantize, and print the figures."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
