"""Servers on loopback: one that never answers, one that takes alerts, and a wandb server in miniature for wandb's own client."""

import gzip
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


class Silent:
    """Accepts connections and never answers."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.held: list[Any] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            self.held.append(self.socket.accept())


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed."""

    def answer(self, path: str, body: bytes) -> Any:
        raise NotImplementedError


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        data = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = handle_any

    def log_message(self, *_: Any) -> None:
        """Tests print what they need."""


class Alerts(Server):
    """Keeps what apprise's json:// posts."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        super().__init__()

    def address(self, path: str) -> str:
        return f"{self.url.replace('http', 'json')}/{path}"

    def answer(self, path: str, body: bytes) -> Any:
        self.posted.append(json.loads(body) | {"path": path})
        return {}


class Wandb(Server):
    """Enough of wandb's protocol for its client to create a run, resume it, stream to it and sync files to it."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.silent = False
        super().__init__()

    def answer(self, path: str, body: bytes) -> Any:
        if self.silent:
            threading.Event().wait()
        if path == "/graphql":
            asked = json.loads(body)
            return {"data": self.query(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            for name, chunk in (json.loads(body).get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    self.runs[path.split("/")[-2]]["history"][chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
            return {"exitcode": None, "limits": {}}
        return {}

    def query(self, text: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "someone"}}
        if "RunResumeStatus" in text:
            if given["name"] not in self.runs:
                return {"model": project | {"bucket": None}}
            history = self.runs[given["name"]]["history"]
            last = json.dumps(history[-1]) if history else "{}"
            counts = {"historyLineCount": len(history), "logLineCount": 0, "eventsLineCount": 0, "historyTail": json.dumps([last] if history else [])}
            more = {"summaryMetrics": last, "eventsTail": "[]", "config": "{}", "tags": [], "notes": "", "wandbConfig": '{"t": {}}'}
            return {"model": project | {"bucket": {"id": "b", "name": given["name"], "displayName": "", **counts, **more}}}
        if "upsertBucket" in text:
            new = given["name"] not in self.runs
            self.runs.setdefault(given["name"], {"history": []}).update({key: value for key, value in given.items() if value is not None})
            bucket = {
                "id": "b",
                "name": given["name"],
                "displayName": given.get("displayName"),
                "description": "",
                "config": "{}",
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket | {"sweepName": None, "historyLineCount": None, "project": project}, "inserted": new}}
        if "createRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "ArtifactType(" in text:
            return {"project": {"artifact": None}}
        if "createArtifact" in text:  # of a table; "committed" asks for no upload
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}}}
        if "viewer" in text:
            return {"viewer": {"id": "v", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}}
        return {}
