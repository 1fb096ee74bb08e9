import io
import sys

import pytest

from dvae.tracking import console
from dvae.tracking.console import CountedProgress, Progress, clock


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(console.time, "monotonic", fake)
    return fake


def test_plain_lines_every_ten_seconds_and_at_the_end(time, capsys):
    with Progress("encoder", total=100, start=40) as progress:
        for step in range(41, 101):
            time.now += 0.5
            progress.update(step, 32, {"loss": 1 / step})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "encoder: 60/100 60%  64 images/s  loss 0.01667  0:20 left",
        "encoder: 80/100 80%  64 images/s  loss 0.0125  0:10 left",
        "encoder: 100/100 100%  64 images/s  loss 0.01  took 0:30",
    ]


def test_the_rate_is_that_of_late(time):
    progress = Progress("encoder", total=1000)
    for step in range(1, 101):
        time.now += 1.0 if step <= 50 else 0.1
        progress.update(step, 10)
    for step in range(101, 301):
        time.now += 0.1
        progress.update(step, 10)
    assert progress.images_per_second() == pytest.approx(100, rel=0.01)


def test_an_interrupted_stage_says_where_it_stopped(time, capsys):
    def work():
        with Progress("refiner", total=10) as progress:
            time.now += 1
            progress.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err.splitlines() == ["refiner: 1/10 10%  0:09 left"]


def test_nothing_done_prints_nothing(capsys):
    with Progress("refiner", total=10, start=10):
        pass
    assert capsys.readouterr().err == ""


def test_counted_images_go_on_from_what_was_done(time, capsys):
    with CountedProgress("shards") as progress:
        progress(40, 100)
        time.now += 1000  # processes start
        for done in range(41, 101):
            progress(done, 100)
            time.now += 0.5
    assert progress.images == 60
    assert capsys.readouterr().err.splitlines() == [
        "shards: 61/100 61%  2.1 images/s  0:19 left",
        "shards: 81/100 81%  2 images/s  0:09 left",
        "shards: 100/100 100%  2 images/s  took 0:30",
    ]


def test_counted_images_that_were_all_there(capsys):
    with CountedProgress("shards") as progress:
        pass
    assert (progress.images, capsys.readouterr().err) == (0, "")


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("refiner", total=10) as progress:
        progress.update(10, 320, {"loss": 0.5})
    shown = sys.stderr.getvalue()
    assert "refiner" in shown
    assert "10/10 100%" in shown
    assert "loss 0.5" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
