"""The map of names that have changed since the golden values were recorded: `names.json`, new name to golden name.

It has seven sections:

- "words": settings of commands and of a run's config. An entry is a key ("denoiser.center"), the beginning of keys
  ("train"), a key with its value ("joint.gradient_to=nothing"), or one of these for a single tool ("sample:images").
  The golden commands are translated into the new words before they are run. The resolved config is translated back.
- "tensors": names in state dicts, as in weights files, checkpoints and snapshots.
- "figures": names of figures in metrics.jsonl, stages.json, summary.json and the JSON files of tools.
- "stages": names of stages, of the modules that a stage trains, and of parts of a bundle.
- "files": names of files and folders in a run folder.
- "functions": names of the functions of keyed randomness.
- "tools": names of commands, the files tools/NAME.py. Words of a single tool are listed under its golden name.

Entries of "words" apply to whole words. All others replace a whole word inside a longer name: "attn" matches in
"mid.attn.qkv" and not in "mid.attn_norm.bias". The golden name may consist of several words ("attention.qkv").
An entry that matches nothing is an error, and so are two names with the same golden name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).parent / "names.json"
SECTIONS = ("words", "tensors", "figures", "stages", "files", "functions", "tools")


class Names:
    """Translates names of today into golden ones, and remembers which entries of the map were of use."""

    def __init__(self, table: dict[str, dict[str, str]]) -> None:
        unknown = sorted(table.keys() - set(SECTIONS))
        if unknown:
            raise ValueError(f"names.json: unknown section {unknown[0]!r}: use {', '.join(SECTIONS)}")
        self.table = {section: dict(table.get(section, {})) for section in SECTIONS}
        for section, entries in self.table.items():
            if len(set(entries.values())) < len(entries):
                raise ValueError(f"names.json: two names of {section!r} have the same golden name")
        self.used: set[tuple[str, str]] = set()

    @classmethod
    def load(cls, path: Path = FILE) -> Names:
        """Read the map."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def golden(self, section: str, name: str) -> str:
        """The golden name of a tensor, figure, stage or file."""
        table = self.table[section]
        if not table:
            return name
        longest_first = sorted(table, key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(new)}(?!\w)" for new in longest_first)

        def put(match: re.Match[str]) -> str:
            self.used.add((section, match[0]))
            return table[match[0]]

        return re.sub(pattern, put, name)

    def all_golden(self, section: str, names: Iterable[str]) -> dict[str, str]:
        """Golden name -> name. Raises ValueError if two names become one."""
        found: dict[str, str] = {}
        for name in names:
            golden = self.golden(section, name)
            if golden in found:
                raise ValueError(f"names.json makes {golden!r} of both {found[golden]!r} and {name!r}")
            found[golden] = name
        return found

    def golden_setting(self, key: str, value: str) -> tuple[str, str]:
        """The golden key and value of a setting in a run's resolved config."""
        table = self.table["words"]
        if (word := f"{key}={value}") in table:
            self.used.add(("words", word))
            key, _, value = table[word].partition("=")
            return key, value
        return self._renamed(table, "", key, "words"), value

    def tool(self, golden: str) -> str:
        """The name of today of a golden command."""
        for new, old in self.table["tools"].items():
            if old == golden:
                self.used.add(("tools", new))
                return new
        return golden

    def today(self, tool: str, word: str) -> str:
        """A golden word of a command, as the tool takes it today."""
        back = {golden: new for new, golden in self.table["words"].items()}
        for candidate in (f"{tool}:{word}", word):
            if candidate in back:
                self.used.add(("words", back[candidate]))
                return back[candidate].removeprefix(f"{tool}:")
        key, equals, value = word.partition("=")
        return self._renamed(back, tool, key, "words", inverse=True) + equals + value

    def _renamed(self, table: dict[str, str], tool: str, key: str, section: str, inverse: bool = False) -> str:
        """`key` with its longest beginning that is in the table replaced."""
        parts = key.split(".")
        for count in range(len(parts), 0, -1):
            begin = ".".join(parts[:count])
            for candidate in (f"{tool}:{begin}", begin):
                if candidate in table:
                    self.used.add((section, table[candidate] if inverse else candidate))
                    new = table[candidate].removeprefix(f"{tool}:")
                    return ".".join([new, *parts[count:]])
        return key

    def unused(self) -> list[str]:
        """Entries of the map that matched nothing."""
        every = {(section, new) for section, entries in self.table.items() for new in entries}
        return [f"{section}: {new}" for section, new in sorted(every - self.used)]
