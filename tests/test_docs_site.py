"""The documentation site: it builds without a warning, loads nothing from other hosts, and its links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests_support import ROOT, environment

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("link", "href")}
"""What a browser loads with a page."""


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if (tag, name) in LOADED and ("rel", "canonical") not in attrs:
                self.loaded.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.add(value)
            elif name in ("id", "name"):
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, in a copy."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "dvae", "launchers", "recipes", "tools"):
        shutil.copytree(ROOT / name, folder / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("zensical.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, folder / name)
    for command in (["docs/make_site.py"], ["-m", "zensical", "build", "--strict", "--clean"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "build" / "site"


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for path in pages:
        away = {url for url in Page(path.read_text(encoding="utf-8")).loaded if re.match(r"(https?:)?//", url)}
        assert not away, f"{path.relative_to(site)} loads {away}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name


@pytest.mark.slow
def test_links_lead_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for url in page.links:
            if re.match(r"[a-z]+:|//", url) or path.name == "404.html":
                continue
            file, _, anchor = unquote(url).partition("#")
            target = (
                (site / file.lstrip("/") if file.startswith("/") else path.parent / file).resolve() if file else path
            )
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.exists() or (anchor and known is not None and anchor not in known.anchors):
                wrong.append(f"{path.relative_to(site)}: {url}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_api_pages_hold_the_docstrings(site: Path) -> None:
    text = (site / "api" / "inference" / "index.html").read_text(encoding="utf-8")
    assert "Load the pipeline of a run folder or a bundle" in text
    assert "RunConfig" in (site / "api" / "settings" / "index.html").read_text(encoding="utf-8")
