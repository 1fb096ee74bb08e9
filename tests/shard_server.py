"""A web server of a folder, in a thread, that counts what is asked for and can be made to fail."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Server(ThreadingHTTPServer):
    """Serves files; `asked` counts them by name."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.asked: Counter[str] = Counter()
        self.delay = 0.0
        """Seconds before each answer."""
        self.cut = 0
        """So many answers yet end in the middle."""
        self.missing = 0
        """So many files yet are not found."""
        self.silent = False
        """Answers begin and never go on."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        time.sleep(self.server.delay)
        if self.server.missing:
            self.server.missing -= 1
            self.send_error(404)
            return
        if self.server.cut or self.server.silent:
            data = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.cut = max(0, self.server.cut - 1)
            while self.server.silent:
                time.sleep(0.05)
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.silent = False
            server.shutdown()
            thread.join()
