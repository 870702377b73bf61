"""A server that stands for one with a model."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["SECRET", "Model"]

SECRET = "sk-9f8e7d6c5b4a"


class Model:
    """A server that answers a prompt with its length; it can be told to fail for some ids."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()
        self.keys: set[str | None] = set()
        self.down_from: float = float("inf")
        model = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.keys.add(self.headers["Authorization"])
                answer: dict[str, Any] = {"length": len(body["prompt"]), "model": body["model"]}
                code = 503 if body["id"] >= model.down_from else 200
                if code == 200:
                    model.seen[body["id"]] += 1
                    if body["id"] % 10 == 7:
                        answer = {"error": f"no answer for {body['id']}"}
                text = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, key: str = SECRET) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1?api_key={key}&n=1"
