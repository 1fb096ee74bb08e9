"""Which code and machine a run is made by, without secrets."""

import subprocess
from pathlib import Path

import pytest

import dvae
from dvae.tracking import provenance
from dvae.utils import package
from dvae.utils.secrets import scrub


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository in which dvae would lie."""
    (tmp_path / "dvae").mkdir()
    (tmp_path / "dvae" / "__init__.py").write_text("x = 1\n")
    me = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(package, "FOLDER", tmp_path / "dvae")
    return tmp_path


def test_commit_and_diff_without_secrets(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    assert provenance.code() == {"version": dvae.__version__, "commit": head.stdout.strip(), "changed": False}
    assert provenance.diff() == ""
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345678")
    (checkout / "dvae" / "__init__.py").write_text("x = 2  # abcdefgh12345678 at https://me:word@host/path\n")
    assert provenance.code()["changed"] is True
    assert "+x = 2  # *** at https://***@host/path" in provenance.diff()


def test_an_installed_package_inside_somebody_elses_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = checkout / "site-packages" / "dvae"
    site.mkdir(parents=True)
    monkeypatch.setattr(package, "FOLDER", site)
    assert provenance.code() == {"version": dvae.__version__}
    assert provenance.diff() == ""


def test_only_what_is_secret_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = "a ratio of 1://2, mail me@example.com, s3://bucket/key"
    assert scrub(text) == text
