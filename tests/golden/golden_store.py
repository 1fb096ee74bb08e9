"""The golden values on disk: a JSON file for each case, one for the machine, one for purposes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from golden_cases import CASES
from golden_purposes import HOLE

HERE = Path(__file__).parent
MACHINE = HERE / "machine.json"
PURPOSES = HERE / "purposes.json"
LARGEST = 300_000
"""Bytes that all files may have together."""
Values = dict[str, Any]


def load() -> dict[str, Values]:
    """The golden values of every case, their configs made whole."""
    found = {case.name: read(HERE / f"{case.name}.json") for case in CASES}
    first = found[CASES[0].name]["config"]
    for values in found.values():
        values["config"] = {key: value for key, value in (first | values["config"]).items() if value is not None}
    return found


def save(values: dict[str, Values], machine: Values) -> None:
    """Write all values. Of a config only what differs from the first case's is kept; null is a setting it lacks."""
    first = values[CASES[0].name]["config"]
    for name, own in values.items():
        config = own["config"]
        if config is not first:
            config = {key: config.get(key) for key in sorted(first | config) if config.get(key) != first.get(key)}
        (HERE / f"{name}.json").write_text(text(own | {"config": config}) + "\n", encoding="utf-8")
    MACHINE.write_text(text(machine) + "\n", encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def text(value: Any) -> str:
    """JSON with a line for each tensor, row and file: short, and changes are seen in a diff."""
    if not isinstance(value, dict) or not value or all(isinstance(item, int | float) for item in value.values()):
        return json.dumps(value, ensure_ascii=False)
    lines = ",\n".join(f"{json.dumps(key, ensure_ascii=False)}: {text(item)}" for key, item in value.items())
    return f"{{\n{lines}\n}}"


def expansions(table: Values) -> dict[str, list[str]]:
    """Purpose as the source has it -> the purposes that the table gives known answers for."""
    return {purpose: list(entry["values"]) for purpose, entry in table["purposes"].items()}


def filled(purpose: str, table: Values) -> list[str]:
    """A purpose with its hole filled by what there is: the stages, or the first numbers."""
    if HOLE not in purpose:
        return [purpose]
    fillings = table["stages"] if purpose.startswith(HOLE) else ["0", "1", "2"]
    return [purpose.replace(HOLE, filling) for filling in fillings]
