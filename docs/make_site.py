"""Copy the documents to build/docs as the site needs them: python docs/make_site.py

README, CONTRIBUTING and CHANGELOG become pages of the site. Links between documents point to these pages. Links to
source files become plain text, because the site does not hold them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the top level that are pages, and their names in the site."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"(!\[[^\]]*\]|src=)(\(|\")docs/")


def make(out: Path) -> None:
    """Write all pages and pictures to the folder `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in out.rglob("*.md"):
        place = Path("docs") / path.relative_to(out)
        path.write_text(page(path.read_text(encoding="utf-8"), place), encoding="utf-8")
    for name, target in PAGES.items():
        (out / target).write_text(page((ROOT / name).read_text(encoding="utf-8"), Path(name)), encoding="utf-8")


def page(text: str, place: Path) -> str:
    """A document as a page of the site; `place` is its path in the repository."""
    text = PICTURE.sub(r"\1\2", text) if place.parent == Path() else text
    return LINK.sub(lambda found: link(found[1], found[2], place), text)


def link(text: str, target: str, place: Path) -> str:
    """A link of a document as the site has it."""
    if target.startswith(("#", "http://", "https://")):
        return f"[{text}]({target})"
    file, hash_, anchor = target.partition("#")
    path = (ROOT / place.parent / file).resolve()
    inside = path.relative_to(ROOT)
    if inside.as_posix() in PAGES:
        inside = Path("docs") / PAGES[inside.as_posix()]
    if inside.parts[0] != "docs" or not path.exists():
        return text if path.exists() else f"[{text}]({target})"  # a lost file stays a link, which the build reports
    up = "../" * (len(place.parent.parts) - 1) if place.parts[0] == "docs" else ""
    return f"[{text}]({up}{inside.relative_to('docs').as_posix()}{hash_}{anchor})"


if __name__ == "__main__":
    make(ROOT / "build" / "docs")
