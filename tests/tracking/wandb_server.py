"""The little of W&B's server that its client needs to log one run; it keeps what it is sent, and fails on demand."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """One run: its history rows, its summary, and how often it was opened."""

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.fault = ""  # hangs: never answers; forbids: takes no rows; unauthorized: knows nobody
        self.upserts: list[dict] = []
        self.history: list[str] = []
        self.summary = "{}"
        self.names: set[str] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, given: dict) -> dict:
        """The little of W&B's GraphQL that its client needs to open a run."""
        entity = {"id": "e", "name": "someone"}
        project = {"id": "p", "name": "test", "entity": entity}
        if operation == "UpsertBucket":
            self.names.add(given["name"])
            self.upserts.append(given)
            run = {"id": "r", "name": given["name"], "displayName": "d", "config": "{}", "project": project}
            return {"upsertBucket": {"inserted": True, "bucket": run | {"historyLineCount": len(self.history)}}}
        if operation == "RunResumeStatus":
            run = {"id": "r", "name": "n", "displayName": "d", "summaryMetrics": self.summary, "tags": []}
            tails = {"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.history)}
            return {"model": {**project, "bucket": {**run, **tails, **counts, "config": "{}"} if self.names else None}}
        if operation == "CreateRunFiles":
            uploads = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": uploads}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "someone", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        return {}


def operation(asked: dict) -> str:
    """The name of a GraphQL request, which the sweep agent gives in the query alone."""
    named = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
    return asked.get("operationName") or (named[1] if named else "")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        answer: dict = {}
        if self.server.fault == "hangs":
            threading.Event().wait()
        if self.server.fault == "unauthorized" or (self.server.fault == "forbids" and "file_stream" in self.path):
            self.send_error(401 if self.server.fault == "unauthorized" else 403)
            return
        if self.path.endswith("/file_stream"):
            sent = json.loads(raw).get("files", {})
            self.server.history += sent.get("wandb-history.jsonl", {}).get("content", [])
            self.server.summary = sent.get("wandb-summary.json", {}).get("content", [self.server.summary])[-1]
        elif self.path == "/graphql":
            asked = json.loads(raw)
            answer = {"data": self.server.answer(operation(asked), asked.get("variables") or {})}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST
