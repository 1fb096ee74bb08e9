"""The page's server, asked by strangers: real requests over a real socket."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from test_page import run  # noqa: F401 a fixture
from tests_support import environment

from dvae.app.page_guard import LARGEST_BODY
from dvae.errors import UserError

KEPT = 8
"""Seconds that this server keeps pictures."""


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[str]
    temporary: Path
    """Where it makes a folder of its own."""
    log: Path

    @property
    def folder(self) -> Path:
        (folder,) = self.temporary.glob("dvae-page-*")
        return folder

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of the answer; headers by names with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, names)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.IncompleteRead as cut:
            return answer.status, cut.partial
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """What is answered to the bytes of a request, which need not be whole."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            return answer

    def call(self, name: str, values: Any) -> tuple[str, Any]:
        """The event that a call of a function ends with, and what comes with it."""
        text = values if isinstance(values, str) else json.dumps({"data": values})
        status, answer = self.ask("POST", f"/gradio_api/call/{name}", text, Content_Type="application/json")
        if status != 200:
            return str(status), answer.decode()
        _, events = self.ask("GET", f"/gradio_api/call/{name}/{json.loads(answer)['event_id']}")
        event, data = re.findall(r"event: (\w+)\ndata: (.*)\n", events.decode())[-1]
        return event, json.loads(data)

    def picture(self, address: str) -> tuple[int, bytes]:
        return self.ask("GET", urlsplit(address).path)


@contextmanager
def serving(run: Path, temporary: Path) -> Iterator[Server]:  # noqa: F811
    """The page of a bundle, served by the real program; its pictures live for seconds."""
    code = f"from dvae.app import page; page.PICTURE_SECONDS, page.CLEANUP_SECONDS = {KEPT}, 1; "
    code += f"page.serve(page.PageConfig(run={str(run)!r}, port=0))"
    log = temporary / "log"
    env = environment(TMPDIR=str(temporary))
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=file, stderr=file, text=True)
    try:
        for _ in range(600):
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found, log.read_text()
        yield Server(int(found[1]), process, temporary, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    with serving(run, tmp_path_factory.mktemp("server")) as started:
        yield started
        assert started.process.poll() is None  # nothing has ended it
        assert "Traceback" not in started.log.read_text()


GOOD = [0, "ddim", 2]


def test_a_call_draws(server: Server) -> None:
    event, (generated, refined, said) = server.call("draw", GOOD)
    assert (event, said) == ("complete", "2 network evaluations per image")
    for shown in (generated, refined):
        status, data = server.picture(shown["url"])
        assert status == 200
        assert np.asarray(Image.open(io.BytesIO(data))).shape == (512, 512, 3)
        assert Path(shown["path"]).is_relative_to(server.folder)


def test_no_upload_is_accepted(server: Server) -> None:
    before = sorted(server.temporary.rglob("*"))
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--b--\r\n'
    kind = {"Content_Type": "multipart/form-data; boundary=b"}
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=a", "/upload", "/gradio_api/upload/"):
        assert server.ask("POST", path, form, **kind)[0] == 403
        assert server.ask("PUT", path, form, **kind)[0] == 405
    assert server.ask("GET", "/gradio_api/upload_progress?upload_id=a")[0] == 403
    assert server.ask("POST", "/gradio_api/queue/join", form, **kind)[0] == 400
    assert sorted(server.temporary.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    ["process_recording", "component_server", "stream/a", "stream/a/close", "run/draw", "api/draw", "vibe-edit",
     "vibe-code", "call/v2/draw", "run-history/connect", "profiling/clear", "login"],
)  # fmt: skip
def test_other_addresses_that_take_bodies_are_closed(server: Server, path: str) -> None:
    assert server.ask("POST", f"/gradio_api/{path}", "{}")[0] == 403
    assert server.ask("POST", f"/{path}", "{}")[0] == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_closed(server: Server, method: str) -> None:
    assert server.ask(method, "/")[0] == 405


HEAD = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize("length", [LARGEST_BODY + 1, 10**9, 10**12, 10**18])
def test_a_long_body_is_refused_before_it_is_sent(server: Server, length: int) -> None:
    for address in (HEAD, HEAD.replace("POST /gradio_api/queue/join", "GET /")):
        assert server.raw(f"{address}Content-Length: {length}\r\n\r\n".encode()).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_is_cut_off(server: Server) -> None:
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    answer = server.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + 3 * chunk)  # and no end
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_of_just_the_limit_is_read(server: Server) -> None:
    body = json.dumps({"data": GOOD, "fn_index": 0, "session_hash": "limit"})
    assert (
        server.ask("POST", "/gradio_api/queue/join", body.ljust(LARGEST_BODY), Content_Type="application/json")[0]
        == 200
    )
    assert server.ask("POST", "/gradio_api/queue/join", body.ljust(LARGEST_BODY + 1))[0] == 413


@pytest.mark.parametrize("length", ["abc", "-1", "1, 2", "9" * 5000])
def test_a_length_that_is_none(server: Server, length: str) -> None:
    status = server.raw(f"{HEAD}Content-Length: {length}\r\n\r\n".encode()).split(b" ")[1]
    assert status in (b"400", b"413")


def test_a_page_of_another_origin_is_refused(server: Server) -> None:
    own = f"127.0.0.1:{server.port}"
    for path, body in (("/", None), ("/config", None), ("/gradio_api/call/draw", json.dumps({"data": GOOD}))):
        method = "POST" if body else "GET"
        for origin in (
            "http://evil.example",
            "null",
            "http://127.0.0.1:1",
            f"http://{own}.evil.example",
            "file://",
            own,
            "",
        ):
            status, answer = server.ask(method, path, body, Origin=origin, Content_Type="application/json")
            assert (status, answer) == (403, b"a page of another origin may not use this one")
        same = server.ask(method, path, body, Origin=f"http://{own}", Content_Type="application/json")
        assert same[0] == 200
    preflight = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}
    assert server.ask("OPTIONS", "/gradio_api/call/draw", **preflight)[0] == 403


def test_a_tunnel_of_another_port_is_the_same_origin(server: Server) -> None:
    assert server.ask("GET", "/config", Host="localhost:8000", Origin="http://localhost:8000")[0] == 200


def test_another_host_is_refused(server: Server) -> None:
    """A name of the attacker's that leads to this machine (DNS rebinding)."""
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "localhost.",
        "10.0.0.1",
        "[::2]",
    ):
        status, answer = server.ask("GET", "/config", Host=host)
        assert status == 403, host
        assert b"this page is not at that host" in answer
        assert server.ask("GET", "/config", Host=host, Origin=f"http://{host}")[0] == 403
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", f"127.0.0.1:{server.port}", "[::1]:7860"):
        assert server.ask("GET", "/config", Host=host)[0] == 200, host
    for host in ("", "a b", "127.0.0.1:x", "user@127.0.0.1", "127.0.0.1/x", "\xe9"):
        assert server.ask("GET", "/config", Host=host)[0] == 400, host
    twice = b"GET /config HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
    assert server.raw(twice).startswith(b"HTTP/1.1 400 ")
    assert server.raw(b"GET /config HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_files_outside_are_not_served(server: Server, run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "secret.txt").write_text("secret")
    link = server.folder / "link"
    link.symlink_to(tmp_path / "secret.txt")
    folder = server.folder
    paths = [
        "/etc/passwd", run / "bundle.json", tmp_path / "secret.txt", link, folder, folder / "..", folder.parent / "log",
        f"{folder}/../log", f"{folder}x/a", "setup.py", "", "http://127.0.0.1:1/", "file:///etc/passwd", "%00",
        "~/.bashrc",
    ]  # fmt: skip
    for path in paths:
        for start in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/static/", "/assets/"):
            status, answer = server.ask("GET", f"{start}{path}")
            assert status in (403, 404), (start, path)
            assert b"root:" not in answer
            assert b"secret" not in answer
    link.unlink()


@pytest.mark.parametrize(
    "path", ["/assets/../../etc/passwd", "/assets/%2e%2e/%2e%2e/setup.py", "/static/..%2f..%2fetc/passwd"]
)
def test_paths_that_climb_are_refused(server: Server, path: str) -> None:
    assert server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")


WRONG = {
    "steps": (2, [0, -1, 251, 10**9, 1.5, "2", "many", None, True, float("nan"), float("inf"), 10**4000]),
    "seed": (0, [-1, 2**53, 1e300, 0.5, "a", None, False, float("nan"), float("-inf"), 10**4000]),
    "sampler": (1, ["dddim", "", None, 5, True, "../ddim", "consistency"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_the_page_would_not_send(server: Server, name: str) -> None:
    place, values = WRONG[name]
    for value in values:
        sent: list[Any] = list(GOOD)
        sent[place] = value
        event, said = server.call("draw", sent)
        assert event == "error", value
        assert said["error"].startswith(f"{name}="), value
        assert len(said["error"]) < 200


@pytest.mark.parametrize(
    ("function", "values", "said"),
    [
        ("edit", [0, 0, "narrow", 1, "ddim", 2], "direction='narrow': known: wide"),
        ("edit", [0, 0, "wide", 4.5, "ddim", 2], "strength=4.5: give a number from -4 to 4"),
        ("edit", [0, 0, "wide", "1", "ddim", 2], "strength='1': give a number from -4 to 4"),
        ("edit", [0, 0, "wide", float("nan"), "ddim", 2], "strength=nan: give a number from -4 to 4"),
        ("edit", [0, 10**12, "wide", 1, "ddim", 2], "image=1000000000000: give a whole number from 0 to 2147483647"),
        ("edit", [0, 0, "wide", 1, "ddim", 10**9], "steps=1000000000: give a whole number from 1 to 250"),
        ("interpolate", [0, 0, -1, "both", "ddim", 2], "to image=-1: give a whole number from 0 to 2147483647"),
        ("interpolate", [0, None, 1, "both", "ddim", 2], "from image=None: give a whole number from 0 to 2147483647"),
        ("interpolate", [0, 0, 1, "x", "ddim", 2], "space='x': known: both, noise, z"),
    ],
)
def test_other_functions_check_their_values_too(server: Server, function: str, values: Any, said: str) -> None:
    event, answer = server.call(function, values)
    assert (event, answer["error"]) == ("error", said)


def test_a_number_beyond_all(server: Server) -> None:
    assert server.call("draw", '{"data": [1e400, "ddim", 2]}')[1]["error"].startswith("seed=inf: give a whole number")
    status, said = server.call("draw", f'{{"data": [{"9" * 5000}, "ddim", 2]}}')
    assert (status, "is not valid JSON" in said) == ("400", True)


@pytest.mark.parametrize(
    "sent",
    ["", "[1, 2", "[]", "5", "null", "[" * 30_000, '{"a": ' * 10_000, '{"data": 5}', '{"data": null}',
     '{"data": {"a": 1}}',
     '{"data": [[0], "ddim", 2]}', '{"data": [0, "ddim"]}', '{"data": [0, "ddim", 2, 3]}', '{"data": []}', "{}",
     "\udcff",
     '{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "ddim", 2]}',
     '{"data": [{"url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}}, "ddim", 2]}',
     '{"data": [0, "ddim", 2], "event_data": {"a": 1}}', '{"data": [0, "ddim", 2], "data": [0, "ddim", 2]}'],
)  # fmt: skip
def test_bodies_that_are_no_call(server: Server, sent: str) -> None:
    body = sent.encode("utf-8", "surrogateescape")
    status, answer = server.ask("POST", "/gradio_api/call/draw", body, Content_Type="application/json")
    assert status == 400, answer


def test_functions_that_are_none(server: Server) -> None:
    def joined(**fields: Any) -> int:
        body = json.dumps({"data": GOOD, "session_hash": "a", **fields})
        return server.ask("POST", "/gradio_api/queue/join", body, Content_Type="application/json")[0]

    assert server.call("nothing", GOOD)[0] == "404"
    assert [joined(fn_index=n) for n in (99, -1, None, "0x", 10**30)] == [404] * 5
    assert joined(fn_index=0) == 200
    assert joined(fn_index=0, session_hash=None) == 400
    assert joined(fn_index=0, session_hash=5) == 422


def test_streams_of_nothing_are_no_traceback(server: Server) -> None:
    for path in ("queue/data?session_hash=nobody", "call/draw/nothing", "call/nothing/nothing"):
        assert server.ask("GET", f"/gradio_api/{path}")[0] in (200, 404)
    assert server.call("draw", GOOD)[0] == "complete"  # it is still there


def test_pictures_are_deleted_after_a_while(server: Server) -> None:
    _, (_, refined, _) = server.call("draw", [77, "ddim", 2])
    assert server.picture(refined["url"])[0] == 200
    for _ in range(600):
        if not Path(refined["path"]).exists():
            break
        time.sleep(0.1)
    assert server.picture(refined["url"])[0] == 403


def test_pictures_are_kept_long_enough_to_be_seen() -> None:
    from dvae.app import page

    assert page.CLEANUP_SECONDS < page.PICTURE_SECONDS <= 3600


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_the_folder_is_gone_at_the_end(run: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:  # noqa: F811
    with serving(run, tmp_path) as started:
        assert started.call("draw", GOOD)[0] == "complete"
        assert list(started.folder.rglob("*.png"))
        started.process.send_signal(number)
        assert started.process.wait(60) == status
    assert list(tmp_path.glob("*page*")) == list(tmp_path.glob("gradio*")) == []
    assert "Traceback" not in started.log.read_text()


def test_places_to_listen() -> None:
    from dvae.app.page import PageConfig, browser_host, listen

    with listen(PageConfig(run="a", host="127.0.0.1", port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} is taken: use another port="):
            listen(PageConfig(run="a", port=port))
    for port in (-1, 65536, 10**30):
        with pytest.raises(UserError, match=f"port={port}: use 0 to 65535"):
            listen(PageConfig(run="a", port=port))
    for host in ("nothing.invalid", "256.256.256.256", "a b", "203.0.113.7"):  # the last is no machine's own
        with pytest.raises(UserError, match=f"host={host} port=0: "):
            listen(PageConfig(run="a", host=host, port=0))
    assert [browser_host(host) for host in ("0.0.0.0", "::", "::1", "[::1]", "mine")] == [
        "127.0.0.1", "127.0.0.1", "[::1]", "[::1]", "mine",
    ]  # fmt: skip


def test_environment_of_gradio_opens_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
    monkeypatch.setenv("GRADIO_MCP_SERVER", "true")
    with serving(run, tmp_path) as started:
        assert started.ask("GET", "/gradio_api/file=/etc/passwd")[0] == 403
        assert started.ask("POST", "/gradio_api/mcp/sse", "{}")[0] == 403
    assert os.environ["GRADIO_ALLOWED_PATHS"] == "/etc"
