"""Compare what a run left with its golden values: bit for bit on the machine of the record, within bounds elsewhere.

The bounds come from runs of the same code with other kernels than the golden ones (torch with AVX-512 and with none of
AVX, oneDNN from SSE4.1 to its own choice with native bf16, OpenBLAS for four processors). The largest deviations over
all cases, after four or five steps, were:

            figures    mean and deviation of a tensor     single weights
    fp32    1.7e-4     8e-5 of its root mean square       1.3e-4 of its root mean square, or 1e-9 if that is tiny
    bf16    3.4e-3     5e-2 of its root mean square       1.4e-3 absolute, in layers that begin at zero

In bf16, rounding may decide the sign of a small gradient, and Adam moves a weight by about the learning rate (1e-3) a
step in its direction, however small it is. No compared pixel moved by more than one grey level. A renamed
purpose, a module or layer that is built in another place of the order, and another default of Adam were each seen
beyond the bounds in every run that they concern, with the kernels that differ most from the golden ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
SUBSETS = ("config", "records")
"""Sections that may hold more than the golden ones: a new setting or record changes nothing that is there."""


@dataclass(frozen=True)
class Bounds:
    """How far values may lie apart on another machine."""

    figure: float
    """Relative to a figure."""
    near_zero: float
    """Absolute, of figures, and of mean and deviation of a tensor."""
    weight: float
    """Relative to the root mean square of a tensor."""
    flipped: float
    """Absolute, of single weights."""
    grey: float
    """Grey levels of single pixels; their mean may move by a quarter of it."""


BOUNDS = {
    "fp32": Bounds(figure=1e-3, near_zero=1e-5, weight=1e-3, flipped=1e-5, grey=2.0),
    "bf16": Bounds(figure=3e-2, near_zero=1e-4, weight=0.1, flipped=4e-3, grey=8.0),
}
COUNTED = {"nfe": 0.1}
"""Integers that an adaptive solver decides, and by how much they may differ, as a share."""
SHARES = {"accuracy": 0.02, "recognised": 0.26, "nothing": 0.26, "classes_present": 1.0, "by_class": 2.0}
"""Shares and counts of images, where a single one may change sides: by how much they may differ."""


def differences(golden: Values, now: Values, precision: str, exact: bool) -> list[str]:
    """Every way in which `now` is not `golden`, a line each."""
    return list(_compared("", golden, now, None if exact else BOUNDS[precision]))


def _compared(path: str, golden: Any, now: Any, bounds: Bounds | None) -> Iterator[str]:
    if isinstance(golden, dict) and isinstance(now, dict):
        yield from (f"{path}/{name}: is gone" for name in golden if name not in now)
        if path.lstrip("/") not in SUBSETS:
            yield from (f"{path}/{name}: is new" for name in now if name not in golden)
        for name in golden:
            if name in now:
                yield from _compared(f"{path}/{name}", golden[name], now[name], bounds)
    elif not (golden == now if bounds is None else alike(path, golden, now, bounds)):
        yield f"{path}: golden {golden!r}, now {now!r}"


def alike(path: str, golden: Any, now: Any, bounds: Bounds) -> bool:
    """Whether two values agree as well as on two machines."""
    if golden == now:
        return True
    if isinstance(golden, list) and isinstance(now, list):
        return len(golden) == len(now) and all(alike(path, a, b, bounds) for a, b in zip(golden, now, strict=True))
    if isinstance(golden, str) and isinstance(now, str):
        return lines_alike(golden.split(), now.split(), bounds)
    if not is_number(golden) or not is_number(now) or path.endswith(("/lr", "/steps")):
        return False
    last = path.replace("/", ".").split(".")
    share = next((apart for name, apart in SHARES.items() if any(part.startswith(name) for part in last)), None)
    if share is not None:
        return abs(golden - now) <= share
    if isinstance(golden, int) and isinstance(now, int):
        return abs(golden - now) <= COUNTED.get(last[-1], 0.0) * abs(golden)
    return abs(golden - now) <= bounds.figure * abs(golden) + bounds.near_zero


def lines_alike(golden: list[str], now: list[str], bounds: Bounds) -> bool:
    """Whether two lines of golden_run (`array`, `whole`, `tar`) agree but for their digests."""
    if len(golden) != len(now) or len(golden) < 4 or not is_digest(golden[0]) or not is_digest(now[0]):
        return False
    if golden[-2] in ("norm", "mean"):
        return golden[1:-1] == now[1:-1] and apart(golden[-1], now[-1]) <= (
            bounds.figure * abs(float(golden[-1])) + bounds.near_zero
        )
    if golden[1:3] != now[1:3] or not golden[1].startswith(("float", "bfloat", "uint8")):
        return False
    mean, deviation, *few = golden[3:]
    if golden[1] == "uint8":
        moments = all(apart(a, b) <= bounds.grey / 4 for a, b in zip(golden[3:5], now[3:5], strict=True))
        return moments and all(apart(a, b) <= bounds.grey for a, b in zip(few, now[5:], strict=True))
    size = bounds.weight * (float(mean) ** 2 + float(deviation) ** 2) ** 0.5
    moments = all(apart(a, b) <= size + bounds.near_zero for a, b in zip(golden[3:5], now[3:5], strict=True))
    return moments and all(apart(a, b) <= size + bounds.flipped for a, b in zip(few, now[5:], strict=True))


def apart(golden: str, now: str) -> float:
    return abs(float(golden) - float(now))


def is_digest(text: str) -> bool:
    return len(text) == 16 and all(letter in "0123456789abcdef" for letter in text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
