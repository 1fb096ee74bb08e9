"""W&B with its real client, offline: nothing leaves the machine."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dvae.errors import MachineError, UserError
from dvae.tracking import wandb_run
from dvae.tracking.pictures import grid
from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_run import _log_records, offline_rows
from dvae.tracking.wandb_settings import WandbConfig, WandbMode

OFFLINE = WandbConfig(mode=WandbMode.offline, project="test")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    home = str(tmp_path_factory.mktemp("home"))
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, home if name != "NETRC" else f"{home}/netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def logs(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"))


def sent(run: Path) -> list[tuple[str, int]]:
    """(stage, step) of every row that W&B's own files hold, in order."""
    rows = [row for path in logs(run) for row in offline_rows(path)]
    return [(key.removesuffix("/step"), row[key]) for row in rows for key in row if key.endswith("/step")]


def kept(run: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in Tracker(run, WandbConfig(), "any").metrics.rows()]


def test_sessions_continue_one_run_and_replayed_steps_arrive_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    (tmp_path / "config.yaml").write_text("recipe: demo\nseed: 3\n")
    grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "images" / "preview.png")
    with Tracker(tmp_path, WandbConfig(), "encoder") as tracker:  # begun without W&B
        tracker.rewind("encoder", 0)
        tracker.log(10, {"loss": 0.5})
    with Tracker(tmp_path, OFFLINE, "refiner") as tracker:
        tracker.rewind("refiner", 0)
        for step in (10, 20, 30):
            tracker.log(step, {"loss": 1 / step})
        tracker.image("preview", tmp_path / "images" / "preview.png", 30)
    with Tracker(tmp_path, OFFLINE, "refiner") as tracker:  # resumed from step 10: 20 and 30 are taken again
        tracker.rewind("refiner", 10)
        for step in (20, 30, 40):
            tracker.log(step, {"loss": 1 / step})
        tracker.image("preview", tmp_path / "images" / "preview.png", 30)

    rows = [("encoder", 10), ("refiner", 10), ("refiner", 20), ("refiner", 30), ("refiner", 40)]
    assert kept(tmp_path) == rows
    picture = ("refiner", 30)
    assert sent(tmp_path) == [*rows[:4], picture, rows[4]]
    assert len({path.name for path in logs(tmp_path)}) == 1  # one id
    last = [row for path in logs(tmp_path) for row in offline_rows(path)][-1]
    assert last["refiner/loss"] == 1 / 40
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert SECRET.encode() not in everything


def test_an_evaluation_sends_table_pictures_and_where_asked_the_bundle(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "samples.png")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.safetensors").write_bytes(b"weights")
    for asked in (False, True):
        config = WandbConfig(mode=WandbMode.offline, project="test", bundle=asked)
        with Tracker(tmp_path, config, "evaluate") as tracker:
            tracker.summarize({"evaluate/psnr": 20.5})
            tracker.results({"evaluate/psnr": 20.5}, [tmp_path / "samples.png"], tmp_path / "bundle")
        row = list(offline_rows(logs(tmp_path)[-1]))[-1]
        assert row["evaluate/samples/_type"] == "image-file"
        table = logs(tmp_path)[-1].parent / "files" / row["evaluate/table/path"]
        assert json.loads(table.read_text())["data"] == [["evaluate/psnr", 20.5]]
        kinds = [Record.FromString(data) for data in _log_records(logs(tmp_path)[-1])]
        artifacts = [record.artifact for record in kinds if record.WhichOneof("record_type") == "artifact"]
        models = [artifact.name for artifact in artifacts if artifact.type == "model"]
        run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
        assert models == ([f"{run_id}-bundle"] if asked else [])


KILLED = """
import os, signal, sys, time
from pathlib import Path
from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_settings import WandbConfig, WandbMode
tracker = Tracker(Path(sys.argv[1]), WandbConfig(mode=WandbMode.offline), "refiner")
tracker.rewind("refiner", 0)
for step in range(1, 301):
    tracker.log(step, {"loss": 1 / step})
    if step == 150:
        time.sleep(2)  # so that W&B writes some rows and not the others
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_after_kill_9_every_row_is_there_once(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    time.sleep(0.5)  # W&B's own process ends by itself
    before = sent(tmp_path)
    assert len(before) >= 150  # and as a rule fewer than the 300 that it had been given
    with Tracker(tmp_path, OFFLINE, "refiner") as tracker:
        tracker.rewind("refiner", 200)  # the last checkpoint
        for step in range(201, 401):
            tracker.log(step, {"loss": 1 / step})
    assert sent(tmp_path) == kept(tmp_path) == [("refiner", step) for step in range(1, 401)]


def test_disabled_imports_nothing_and_writes_nothing_of_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dvae.tracking.tracker import Tracker;"
        "from dvae.tracking.wandb_run import WandbConfig; t = Tracker(Path(sys.argv[1]), WandbConfig(), 'encoder');"
        "t.log(1, {'loss': 1.0}); t.close(); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_online_without_a_login_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"tracking\.wandb\.mode=online: .*wandb login") as caught:
        Tracker(tmp_path, WandbConfig(mode=WandbMode.online), "encoder")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "wandb.json").write_text("{}")
    with pytest.raises(MachineError, match=r"wandb\.json: holds no run id"):
        Tracker(tmp_path, OFFLINE, "encoder")
    (tmp_path / "odd.wandb").write_bytes(b"something else")
    with pytest.raises(MachineError, match=r"odd\.wandb: not a W&B log"):
        list(offline_rows(tmp_path / "odd.wandb"))


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "null", '{"id": 3}', '{"id": ""}', '{"id": "../../else"}', '{"id": "*"}', '{"id": "a b"}',
        '{"id": "a", "id": "b"}', '{"id": "a", "kept": "b"}', '{"id": "a", "kept": [3]}',
        '{"id": "a", "kept": ["; rm -rf ~"]}', '{"id": "a", "kept": ["../../else"]}', '{"id": "a\\n"}',
    ],
)  # fmt: skip
def test_a_record_that_names_no_run_is_one_line(tmp_path, text):
    (tmp_path / "wandb.json").write_text(text)
    with pytest.raises(
        MachineError, match=r"wandb\.json: holds no run id \(.*\); delete it to begin a new W&B run$"
    ) as error:
        Tracker(tmp_path, OFFLINE, "encoder")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("kind", "make"), [("a folder", Path.mkdir), ("a pipe", os.mkfifo)])
def test_what_is_no_file_is_one_line(tmp_path, kind, make):
    make(tmp_path / "wandb.json")
    with pytest.raises(MachineError, match=rf"wandb\.json: holds no run id \(is {kind}, not a file\)"):
        Tracker(tmp_path, OFFLINE, "encoder")
    make(tmp_path / "odd.wandb")
    with pytest.raises(MachineError, match=rf"odd\.wandb: is {kind}, not a file"):
        list(offline_rows(tmp_path / "odd.wandb"))


def test_a_config_that_is_none_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &x [1]\nb: *x\n")
    with pytest.raises(MachineError, match=r"config\.yaml: uses aliases"):
        Tracker(tmp_path, OFFLINE, "encoder")


WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def chunk(data: bytes, kind: int, length: int | None = None) -> bytes:
    return struct.pack("<IHB", 0, len(data) if length is None else length, kind) + data


def history(**values: str) -> bytes:
    from wandb.proto.wandb_internal_pb2 import Record

    record = Record()
    for key, value in values.items():
        item = record.history.item.add()
        item.key, item.value_json = key, value
    return record.SerializeToString()


HEAD = b":W&B\xe1\xbe\x00"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (chunk(b"\xff" * 20, WHOLE), "Error parsing message"),
        (chunk(history(a="{"), WHOLE), "is not valid JSON"),
        (chunk(history(a="9" * 9999), WHOLE), "is not valid JSON"),
        (chunk(b"x", 9), "no chunk begins at byte 7"),
        (chunk(b"x", WHOLE, 65535), "no chunk begins at byte 7"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path, data, reason):
    path = tmp_path / "odd.wandb"
    path.write_bytes(HEAD + data)
    with pytest.raises(MachineError, match=f"odd.wandb: is damaged .*{reason}.*; move it away to go on") as error:
        list(offline_rows(path))
    assert len(str(error.value).splitlines()) == 1


def test_a_record_without_end_is_not_collected_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "RECORD_LIMIT", 100_000)
    path = tmp_path / "odd.wandb"
    path.write_bytes(HEAD + chunk(bytes(32754), FIRST) + chunk(bytes(32761), MIDDLE) * 9)
    with pytest.raises(MachineError, match="a record has more than 100000 bytes"):
        list(offline_rows(path))


def test_the_unfinished_end_of_a_log_is_no_row(tmp_path):
    path = tmp_path / "odd.wandb"
    row = chunk(history(**{"a/step": "3"}), WHOLE)
    for end in (b"", row[:-1], row[:3], bytes(40_000)):
        path.write_bytes(HEAD + row + end)
        assert list(offline_rows(path)) == [{"a/step": 3}]


@pytest.mark.parametrize("step", ['"3"', "-1", "NaN", "1e999", "[3]", "true", "9" * 30])
def test_a_step_that_is_none_is_one_line(tmp_path, step):
    folder = tmp_path / "wandb" / "offline-run-1"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").write_bytes(HEAD + chunk(history(**{"a/step": step}), WHOLE))
    (tmp_path / "wandb.json").write_text('{"id": "abc"}')
    with pytest.raises(MachineError, match=r"run-abc\.wandb: is damaged \(a step is"):
        Tracker(tmp_path, OFFLINE, "encoder")
