"""An OpenAI-compatible endpoint on this machine, whose answers a test scripts."""

from __future__ import annotations

import http.server
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 200}
_WORDS = [f"word{number}" for number in range(40)]


@dataclass
class Answer:
    """What the endpoint sends; `text` fills the completion, `raw` replaces the whole body."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    finish_reason: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: dict(USAGE))
    raw: bytes | None = None


def draft(seed: int) -> str:
    """A usable reply; another seed gives another question."""
    drawn = random.Random(seed)
    texts = {name: " ".join(drawn.choices(_WORDS, k=12)) for name in ("question", "rejected", "accepted")}
    return json.dumps(texts)


def good(request: dict[str, Any], number: int) -> Answer:
    return Answer(text=draft(request["seed"]))


Script = Callable[[dict[str, Any], int], Answer]


class ChatServer:
    """Answers by a script, which gets the request and its number from 0 on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.script: Script = good
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._lock = threading.Lock()

    def take(self, path: str, headers: dict[str, str], fields: dict[str, Any]) -> Answer:
        with self._lock:
            number = len(self.requests)
            self.requests.append(fields)
            self.headers.append(headers)
            self.paths.append(path)
        return self.script(fields, number)


@contextmanager
def serving() -> Iterator[ChatServer]:
    """A server for as long as the block runs; needs `enable_socket`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = server_state.take(self.path, dict(self.headers), fields)
            time.sleep(answer.delay_s)
            choice = {"message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.finish_reason}
            body = json.dumps({"choices": [choice], "usage": answer.usage}).encode()
            content = body if answer.raw is None else answer.raw
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server_state = ChatServer(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server_state
        finally:
            server.shutdown()
            thread.join()
