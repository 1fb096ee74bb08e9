"""The guard around the page, alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dvae.app import page_guard
from dvae.app.page_guard import Guard


def ask(
    guard: Guard,
    method: str = "GET",
    path: str = "/",
    parts: tuple[bytes, ...] = (b"",),
    kind: str = "http",
    **headers: str,
) -> list[dict[str, Any]]:
    """What is sent in answer to a request whose body comes in parts; None waits for ever."""
    sent: list[dict[str, Any]] = []
    rest = list(parts)

    async def receive() -> dict[str, Any]:
        if not rest:
            await asyncio.sleep(1000)
        part = rest.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(rest) or parts[-1] == b"..."}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "localhost", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    asyncio.run(guard({"type": kind, "method": method, "path": path, "headers": pairs}, receive, send))
    return sent


class App:
    """An application that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, list[bytes]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.asked.append((scope["path"], message["body"], [name for name, _ in scope["headers"]]))
        await send({"type": "http.response.start", "status": 200, "headers": []})


def made(host: str = "127.0.0.1", folder: Path = Path("/nowhere")) -> tuple[Guard, App]:
    app = App()
    return Guard(app, host, folder, {0: 2, "draw": 2}), app


def test_a_body_in_parts_is_handed_on_whole() -> None:
    guard, app = made()
    parts = (b'{"data": [1', b', "a"], ', b'"fn_index": 0}')
    assert ask(guard, "POST", "/gradio_api/queue/join", parts, range="bytes=1-2")[0]["status"] == 200
    assert app.asked == [("/gradio_api/queue/join", b"".join(parts), [b"host"])]  # and no range


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("127.0.0.1", "other.example", 403),
        ("mine.example", "mine.example:80", 200),
        ("MINE.example", "Mine.Example", 200),
        ("mine.example", "localhost", 200),
        ("mine.example", "other.example", 403),
        ("192.168.1.5", "192.168.1.5:7860", 200),
        ("192.168.1.5", "192.168.1.6:7860", 403),
        ("::1", "[::1]:7860", 200),
        ("[fe80::1]", "[fe80::1]", 200),
        ("0.0.0.0", "any.example", 200),
        ("::", "any.example:1", 200),
        ("0.0.0.0", "no host", 400),
    ],
)
def test_hosts(host: str, name: str, status: int) -> None:
    assert ask(made(host)[0], host=name)[0]["status"] == status


def test_even_for_all_hosts_a_page_of_another_origin_is_refused() -> None:
    guard, app = made("0.0.0.0")
    assert ask(guard, host="any.example", origin="http://evil.example")[0]["status"] == 403
    assert app.asked == []
    assert ask(guard, host="any.example", origin="https://any.example")[0]["status"] == 200


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_guard, "SECONDS", 0.05)
    guard, app = made()
    assert ask(guard, "POST", "/gradio_api/queue/join", (b'{"data"', b"..."))[0]["status"] == 408
    assert app.asked == []


def test_no_websocket_is_opened() -> None:
    guard, app = made()
    assert ask(guard, kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert app.asked == []


def test_only_pictures_in_the_folder_are_files(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.png").write_text("a")
    (folder / "link").symlink_to("/etc/passwd")
    guard, _ = made(folder=folder)

    def status(path: object) -> int:
        return ask(guard, path=f"/gradio_api/file={path}")[0]["status"]

    assert status(folder / "a.png") == 200
    others = [folder, folder / "b.png", folder / "link", tmp_path, "a.png", "\0", "x" * 10_000]
    assert [status(path) for path in others] == [403] * len(others)


def test_a_fault_of_the_application_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no\nsuch stream")

    assert ask(Guard(broken, "localhost", Path("/nowhere"), {})) == []
    assert capsys.readouterr().err == "dvae: the page could not answer '/': RuntimeError: no such stream\n"
