"""A token that a run needs is used, and written nowhere: no file of the run, no W&B file, no error line."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import yaml
from shard_server import serving
from tests_support import ROOT, Tool, environment

from dvae.config import compose, stored
from dvae.data.building.shard_build import build
from dvae.data.shards.remote import RemoteShards
from dvae.errors import UserError, printable_line
from dvae.utils import secrets
from dvae.utils.secrets import scrub

TOKEN = "tok-9f8e7d6c5b4a"
REFERENCE = "${oc.env:SHARDS_PART}"


def places_of(text: str, folder: Path) -> list[str]:
    """Files below `folder` that hold `text`, in whatever format."""
    found = [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in found]


def test_a_token_from_the_environment_is_used_and_written_nowhere(tmp_path: Path, tiny: list[str], tool: Tool) -> None:
    build({"name": "avatars", "n": 160}, 16, tmp_path / "web" / TOKEN, 0.2, workers=1)
    with serving(tmp_path / "web") as server:
        words = [
            *tiny, "stages=[shards,encoder]", f"data.shards={server.url}/{REFERENCE}", "run=run",
            "tracking.wandb.mode=offline",
        ]  # fmt: skip
        known = {"no_proxy": "127.0.0.1", "SHARDS_PART": TOKEN}
        shown = tool("launch", *words, "dry_run=true", **known)
        done = tool("launch", *words, **known)
        again = tool("launch", *words, "stages=[shards,encoder,prior]", **known)
        lacking = tool("launch", *words, no_proxy="127.0.0.1")
        (tmp_path / "web" / TOKEN).rename(tmp_path / "web" / "gone")
        shutil.rmtree(tmp_path / "run" / "remote")
        wrong = tool("launch", *words, "run=other", **known)
    assert done.returncode == 0, done.stderr
    assert again.returncode == 0, again.stderr
    assert (lacking.returncode, wrong.returncode) == (2, 2)
    assert "need the environment variable SHARDS_PART, which is not set" in lacking.stderr
    assert "no shards at data.shards=http://127.0.0.1" in wrong.stderr
    assert not (tmp_path / "other").exists()
    assert REFERENCE in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["shards"]
    assert REFERENCE in shown.stdout
    for said in (shown, done, again, lacking, wrong):
        assert TOKEN not in said.stdout + said.stderr
    assert any((tmp_path / "run" / "wandb").iterdir())
    assert places_of(TOKEN, tmp_path / "run") == []


def test_a_run_is_resumed_from_its_folder_only_if_the_user_trusts_what_it_uses(
    tmp_path: Path, tiny: list[str], tool: Tool
) -> None:
    build({"name": "avatars", "n": 160}, 16, tmp_path / "shards", 0.2, workers=1)
    place = "pipe:cat shards/%s; touch ${oc.env:MARKER_FILE}"
    words = [*tiny, "stages=[shards]", f"data.shards='{place}'", "run=run"]
    assert tool("launch", *words, MARKER_FILE="first-marker").returncode == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    settings["stages"] = ["shards", "encoder"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree(tmp_path / "run" / "remote")
    refused = tool("runs", "resume", "run=run", MARKER_FILE="second-marker")
    assert refused.returncode == 2
    assert "its config.yaml uses data.shards=pipe:cat" in refused.stderr
    assert "the environment variable MARKER_FILE: if that is what you want, add trust=true" in refused.stderr
    assert not (tmp_path / "second-marker").exists()
    done = tool("runs", "resume", "run=run", "trust=true", MARKER_FILE="second-marker")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second-marker").exists()


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("data.shards=https://me:hunter22@host/x", "write data.shards='...${oc.env:PASSWORD}...'"),
        ("data.shards='s3://bucket/x?X-Amz-Signature=0a1b2c3d'", "${oc.env:PASSWORD}"),
        ("data.shards='pipe:curl -H \"Authorization: Bearer 0a1b2c3d4e\" http://h/%s'", "${oc.env:PASSWORD}"),
        ("data.shards=http://host/tok-9f8e7d6c5b4a", "${oc.env:MY_API_TOKEN}"),
        ("tracking.wandb.name=tok-9f8e7d6c5b4a", "write tracking.wandb.name='...${oc.env:MY_API_TOKEN}...'"),
        ("run=runs/${oc.env:SHARDS_PART}", "let the shell insert the value"),
    ],
)
def test_a_secret_in_a_setting_is_refused_before_anything_is_written(
    word: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    monkeypatch.setenv("SHARDS_PART", TOKEN)
    with pytest.raises(UserError) as refused:
        stored.stored(compose.compose("train", ["recipe=demo", word]))
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_references_are_kept_and_places_of_the_system_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("SEED_OF_THE_DAY", "7")
    monkeypatch.setenv("SHARDS_PART", TOKEN)
    words = ["data.shards=http://h/${oc.env:SHARDS_PART}", "seed=${oc.env:SEED_OF_THE_DAY}",
             "data.download_to=${oc.env:SCRATCH}/x", "encoder_weights=${data.shards}"]  # fmt: skip
    composed = compose.compose("train", ["recipe=demo", *words])
    kept = stored.stored(composed)
    assert kept["data"]["shards"] == "http://h/${oc.env:SHARDS_PART}"
    assert kept["encoder_weights"] == "${data.shards}"  # by way of another setting
    assert kept["seed"] == "${oc.env:SEED_OF_THE_DAY}"
    assert kept["data"]["download_to"] == "/scratch/me/x"
    assert TOKEN not in json.dumps(kept)
    assert compose.to_run_config(composed).seed == 7


def test_settings_read_as_data_resolve_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS_PART", TOKEN)
    words = ["data.shards=http://h/${oc.env:SHARDS_PART}", "source.seed=3"]
    kept = stored.stored(compose.compose("train", ["recipe=demo", *words]))
    kept["plugins"] = ["no_such_module"]
    kept["tracking"]["wandb"]["name"] = "\\\\${oc.env:SHARDS_PART} ${a${oc.env:SHARDS_PART}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    read = stored.load(tmp_path / "config.yaml")
    assert read.data.shards == "http://h/$(oc.env:SHARDS_PART)"
    assert TOKEN not in str(read)
    with pytest.raises(UserError, match="module 'no_such_module' cannot be imported"):
        stored.load_own(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://u:p@host/x", "http://***@host/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("curl -u me:secret http://h", "curl -u me:*** http://h"),
        ("authorization: Bearer abcdefgh", "authorization: Bearer ***"),
        (
            "the token of a class, basic training, a ratio of 1://2",
            "the token of a class, basic training, a ratio of 1://2",
        ),
        ("mail me@example.com", "mail me@example.com"),
    ],
)
def test_addresses_and_headers_are_scrubbed(text: str, left: str) -> None:
    assert scrub(text) == left


def test_an_unexpected_error_shows_no_secret(tmp_path: Path) -> None:
    code = (
        "from dvae.errors import run_command\n"
        f"def fail(words): raise RuntimeError('http://h/{TOKEN} was not expected')\n"
        "run_command(fail)\n"
    )
    env = environment(SOME_API_KEY=TOKEN, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "http://h/*** was not expected" in done.stderr
    assert len(TOKEN) >= secrets.SHORTEST


@pytest.mark.parametrize("value", ['pa"ss\\wo&rd<x', "correct  horse  battery", "with/slash and space", "ab12"])
def test_a_value_is_found_in_whatever_form_it_is_written(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    secrets.remember(value)
    quoted = [repr(value), json.dumps(value), html.escape(value), urllib.parse.quote(value), " ".join(value.split())]
    for form in (value, *quoted, f"http://h/{value}/x"):
        left = scrub(f"a {form} z")
        assert "***" in left
        assert value not in left
    assert "***" in printable_line(f"{value}\n")


def test_wandb_is_given_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYX", TOKEN)
    monkeypatch.setenv("WANDB_ENTITY", "team")
    for word in ("tracking.wandb.name=${oc.env:MYX}", 'tracking.wandb.tags=["a${oc.env:MYX}"]'):
        with pytest.raises(UserError, match="none can refer to an environment variable"):
            stored.stored(compose.compose("train", ["recipe=demo", word]))
    kept = stored.stored(compose.compose("train", ["recipe=demo", "tracking.wandb.entity=${oc.env:WANDB_ENTITY}"]))
    assert kept["tracking"]["wandb"]["entity"] == "team"


def test_fetched_shards_lie_in_no_folder_named_by_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    names = set()
    for token in (TOKEN, "another-token-1234"):
        secrets.remember(token)
        names.add(RemoteShards(f"http://host/{token}/faces", tmp_path, 1.0).folder.name)
    assert len(names) == 1
    assert RemoteShards("http://host/other/faces", tmp_path, 1.0).folder.name not in names
