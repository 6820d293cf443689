#!/usr/bin/env python3
"""A stand-in for Qdrant: its settings, its health paths and its collections, kept in memory.

It is not Qdrant. It is for tests on machines without it, and says so in its title.
"""

import json
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COLLECTION = re.compile(r"/collections/([^/?]+)")


class Api(BaseHTTPRequestHandler):
    """Qdrant's REST paths for health and collections."""

    protocol_version = "HTTP/1.1"
    collections: dict[str, Any] = {}  # noqa: RUF012 (one store for all requests, as meant)

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, {"title": "qdrant stand-in", "version": "0.0.0"})
        elif self.path in ("/healthz", "/livez", "/readyz"):
            self.answer_text(f"{self.path[1:]} check passed")
        elif self.path == "/collections":
            names = [{"name": name} for name in self.collections]
            self.answer_result({"collections": names})
        elif (name := self.collection()) in self.collections:
            config = {"params": self.collections[name]}
            self.answer_result({"status": "green", "points_count": 0, "config": config})
        else:
            self.answer_missing()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        name = self.collection()
        if not name:
            self.answer_missing()
        elif name in self.collections:
            error = {"error": f"Wrong input: Collection `{name}` already exists!"}
            self.answer(409, {"status": error, "time": 0.0})
        else:
            self.collections[name] = json.loads(body or b"{}")
            self.answer_result(True)

    def do_DELETE(self) -> None:
        self.answer_result(self.collections.pop(self.collection(), None) is not None)

    def collection(self) -> str:
        match = COLLECTION.fullmatch(self.path)
        return match[1] if match else ""

    def answer_result(self, result: object) -> None:
        self.answer(200, {"result": result, "status": "ok", "time": 0.0})

    def answer_missing(self) -> None:
        error = {"error": f"Not found: Collection `{self.collection()}` doesn't exist!"}
        self.answer(404, {"status": error, "time": 0.0})

    def answer(self, status: int, document: object) -> None:
        self.send(status, "application/json", json.dumps(document).encode())

    def answer_text(self, text: str) -> None:
        self.send(200, "text/plain", text.encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    host = os.environ.get("QDRANT__SERVICE__HOST", "0.0.0.0")
    port = int(os.environ.get("QDRANT__SERVICE__HTTP_PORT", "6333"))
    with ThreadingHTTPServer((host, port), Api) as server:
        sys.stdout.write(f"qdrant stand-in: HTTP listening on {port}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
