"""Renew the golden values, or compare two checkouts bit for bit on this machine.

    python tests/golden/renew.py                              what differs from the golden values
    python tests/golden/renew.py --yes-i-changed-behavior     write them anew
    python tests/golden/renew.py --tree FOLDER                take the code of another checkout, for either of these
    python tests/golden/renew.py --against FOLDER             compare this code with another checkout's, write nothing
    python tests/golden/renew.py --apart                      each command in a process of its own (three minutes)

The golden values hold bit for bit on one kind of machine (machine.json). On another one, --against gives the same
assurance: check out the commit before a change, and compare with it.

    git worktree add ../before COMMIT && python tests/golden/renew.py --against ../before
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # where tests_support lies; pytest sees to that itself

import golden_answers as answers
import golden_store as store
from golden_cases import CASES
from golden_compare import differences
from golden_names import Names
from golden_purposes import Source
from golden_run import collect, execute
from tests_support import ROOT

SHOWN = 40


def main(argv: list[str]) -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--yes-i-changed-behavior", action="store_true")
    words.add_argument("--tree", type=Path, default=ROOT)
    words.add_argument("--against", type=Path)
    words.add_argument("--apart", action="store_true")
    asked = words.parse_args(argv)
    if asked.against and asked.yes_i_changed_behavior:
        words.error("--against writes nothing: leave one of the two out")
    if asked.against:
        now, _ = measured(asked.tree, Names.load(), asked.apart)
        before, _ = measured(asked.against, Names({}), asked.apart)
        return tell(found_between(before, now))
    names = Names.load() if asked.tree == ROOT else Names({})
    table = purposes(Source(asked.tree, names))
    now, machine = measured(asked.tree, names, asked.apart, table)
    known = all((store.HERE / f"{case.name}.json").exists() for case in CASES)
    found = found_between(store.load(), now) if known else ["there are no golden values yet"]
    found += differences(store.read(store.PURPOSES), table, "fp32", exact=True)
    if known and machine != store.read(store.MACHINE):
        print("machine: another one than that of the record, so bits may differ without a change of the code")
    status = tell(found)
    if asked.yes_i_changed_behavior:
        store.save(now, machine)
        store.PURPOSES.write_text(store.text(table) + "\n", encoding="utf-8")
        print(f"written to {store.HERE}")
        return 0
    if status:
        print("nothing is written: add --yes-i-changed-behavior if this is what you want")
    return status


def measured(tree: Path, names: Names, apart: bool, table: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of every case by the code of `tree`, and the machine."""
    every = store.expansions(table or store.read(store.PURPOSES))
    keys = {f"{answers.key(purpose):016x}": purpose for purposes in every.values() for purpose in purposes}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "golden"
        execute(folder, tree, names, apart)
        return collect(folder, names, keys), json.loads((folder / "machine.json").read_text(encoding="utf-8"))


def found_between(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """All differences, bit for bit."""
    return [
        f"{case.name}{line}"
        for case in CASES
        for line in differences(golden[case.name], now[case.name], case.precision, exact=True)
    ]


def tell(found: list[str]) -> int:
    """Print the differences; the exit status."""
    for line in found[:SHOWN]:
        print(line)
    more = len(found) - SHOWN
    print(f"... and {more} more differences" if more > 0 else f"{len(found)} differences")
    return int(bool(found))


def purposes(source: Source) -> dict[str, Any]:
    """The table of purposes, seeds and unkeyed draws, with the words of the present one and "?" where it has none."""
    before = store.read(store.PURPOSES)
    table: dict[str, Any] = {"stages": before["stages"], "purposes": {}, "seeds": {}, "unkeyed": source.unkeyed()}
    for purpose, by in sorted(source.purposes().items()):
        functions = sorted(by)
        about = before["purposes"].get(purpose, {}).get("draws", "?")
        every = store.filled(purpose, before)
        values = {one: {function: answers.answer(function, one) for function in functions} for one in every}
        table["purposes"][purpose] = {"draws": about, "by": functions, "values": values}
    for call, count in sorted(source.seeds().items()):
        about = before["seeds"].get(call, {}).get("seeds", "?")
        table["seeds"][call] = {"seeds": about, "count": count}
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
