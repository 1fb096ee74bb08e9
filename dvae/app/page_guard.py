"""Check every request to the page in an ASGI layer, before the web application sees it.

The page shows pictures that this machine computes, and takes only a few numbers and names. The guard therefore:
- refuses uploads and large bodies;
- refuses all addresses that the page does not use;
- refuses requests from another origin or for another host. Otherwise a site that the user visits could use the page
  through the user's browser (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from dvae.errors import fold
from dvae.tracking.console import say
from dvae.utils.read import DamagedFile, parse_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 64 * 2**10
"""Maximum size of a request's body in bytes. The page's own requests have a few hundred bytes."""
SECONDS = 10.0
"""Time within which the body of a request must arrive, in seconds."""
LONGEST_TEXT = 1000
"""Maximum number of characters of a text in a body."""
API = "/gradio_api"
GET = re.compile(
    r"/|/(config|theme\.css|robots\.txt|favicon\.ico|manifest\.json)/?|/(assets|static|svelte)/.+|"
    rf"{API}/(info|app_id|theme\.css|queue/data)/?|{API}/(heartbeat|call/[a-z_0-9]+)/[\w-]+|{API}/file=.+"
)
"""Addresses that a browser may read. All other addresses are closed: uploads, proxies, streams, editors, ..."""
POST = re.compile(rf"{API}/(?:(queue/join)|call/([a-z_0-9]+)|cancel|reset)/?")
"""Addresses to which a browser may send."""
FILE = f"{API}/file="
ALWAYS = {"localhost", "127.0.0.1", "::1"}
EVERYWHERE = {"0.0.0.0", "::", ""}
"""Hosts that accept requests from other machines. These may use any name for this machine."""


class RefusedRequest(Exception):
    """A request that is refused, with the HTTP status and the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Guard:
    """An ASGI application that checks requests and passes the accepted ones on.

    Args:
        app: the application to protect.
        host: the host that the server listens on.
        folder: the folder of the page's pictures. No other file is served.
        inputs: how many values each function of the page takes, by its name and by its number.
    """

    def __init__(self, app: Application, host: str, folder: Path, inputs: Mapping[str | int, int]) -> None:
        self.app, self.host, self.folder, self.inputs = app, host.strip("[]").lower(), folder.resolve(), inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                self._check_names(scope)
                self._check_address(scope["method"], scope["path"])
                body = await asyncio.wait_for(_body(scope, receive), SECONDS)
                if scope["method"] == "POST":
                    self._check_call(scope["path"], parse_call(body))
            except TimeoutError:
                await _answer(send, 408, "the body did not arrive")
            except RefusedRequest as refused:
                await _answer(send, refused.status, refused.why)
            else:
                await self._pass_on(scope, _again(body, receive), send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application, without its range header."""
        # pictures are small, so a browser never needs a part of one
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"range"]
        try:
            await self.app({**scope, "headers": headers}, receive, send)
        except Exception as error:  # noqa: BLE001 print one line: a traceback for each bad request would fill the log
            say(f"the page could not answer {scope['path'][:80]!r}: {type(error).__name__}: {fold(error)[:200]}")

    def _check_names(self, scope: Scope) -> None:
        """Raise RefusedRequest if the request is for another host or from a page of another origin."""
        hosts, origins = _header(scope, b"host"), _header(scope, b"origin")
        if len(hosts) != 1 or len(origins) > 1:
            raise RefusedRequest(400, "a request has one host and one origin")
        name = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", hosts[0], re.IGNORECASE | re.ASCII)
        if name is None:
            raise RefusedRequest(400, "no host")
        asked = (name[1] or name[2]).lower()
        if self.host not in EVERYWHERE and asked not in {self.host, *ALWAYS}:
            raise RefusedRequest(403, f"this page is not at that host: start it with host={asked[:80]} if it should be")
        if origins and origins[0].lower() not in {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}:
            raise RefusedRequest(403, "a page of another origin may not use this one")

    def _check_address(self, method: str, path: str) -> None:
        """Raise RefusedRequest for an address that the page does not use, and for a file that the page did not make."""
        known = {"GET": GET, "HEAD": GET, "POST": POST}.get(method)
        if known is None:
            raise RefusedRequest(405, "only GET, HEAD and POST are allowed")
        if not known.fullmatch(path) or ".." in path.split("/"):
            raise RefusedRequest(403, "this page has no such address, and takes no files")
        if path.startswith(FILE):
            try:
                # resolve links first, so that no link in the folder leads to a file outside it
                real = Path(os.path.realpath(path.removeprefix(FILE)))
            except (OSError, ValueError):
                raise RefusedRequest(403, "no such picture") from None
            if not real.is_relative_to(self.folder) or not real.is_file():
                raise RefusedRequest(403, "no such picture")

    def _check_call(self, path: str, call: dict[str, Any]) -> None:
        """Raise RefusedRequest if the page has no such function, or if the number of values is wrong."""
        address = POST.fullmatch(path)
        assert address is not None  # _check_address has matched it
        if not (address[1] or address[2]):
            return
        function = call.get("fn_index") if address[1] else address[2]
        wanted = self.inputs.get(function) if isinstance(function, (int, str)) else None
        if wanted is None:
            raise RefusedRequest(404, "the page has no such function")
        if len(call.get("data", [])) != wanted:
            raise RefusedRequest(400, f"this function takes {wanted} values")


def parse_call(body: bytes) -> dict[str, Any]:
    """Parse the body of a call. Returns its fields; "data" holds the values for the function.

    Raises RefusedRequest if the body is not a JSON object of plain values. The application would treat a mapping in
    place of a number as a file, and fetch it.
    """
    try:
        value = parse_json(body or b"{}", "the body")
    except DamagedFile as error:
        raise RefusedRequest(400, error.reason[:200]) from None
    if not isinstance(value, dict):
        raise RefusedRequest(400, "the body is not a JSON object")
    data = value.get("data", [])
    others = (item for name, item in value.items() if name != "data")
    if not isinstance(data, list) or not all(map(_is_plain, [*data, *others])):
        raise RefusedRequest(400, "the body holds more than numbers and names")
    return value


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_TEXT
    return value is None or isinstance(value, (bool, int, float))


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Read the body of a request.

    Raises RefusedRequest if it is too long. If the header states the length, nothing is read first.
    """
    too_long = RefusedRequest(413, f"a request has at most {LARGEST_BODY} bytes")
    for length in _header(scope, b"content-length"):
        if not (length.isascii() and length.isdecimal() and len(length) < 10 and int(length) <= LARGEST_BODY):
            raise too_long
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise RefusedRequest(400, "the client left")
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise too_long
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that returns the already read `body` first, and then the client's next messages."""
    first = True

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


async def _answer(send: Send, status: int, text: str) -> None:
    # the rest of a long body was not read, so the connection must be closed
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode("utf-8", "replace")})
