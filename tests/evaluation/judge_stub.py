"""A server on 127.0.0.1 that speaks the protocol of chat completions, well or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "planted-Key-0123456789abcdef"
HTML = b"<!doctype html><title>Welcome</title>"


@dataclass(frozen=True)
class Said:
    """An answer of the server; with `length`, one that says to be longer than it is."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    length: int | None = None


Answers = Callable[[dict[str, Any]], Said]


def said(text: str | None, finish: str = "stop", tokens: tuple[int, int] = (100, 10)) -> Said:
    """A chat completion."""
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"id": "c-1", "object": "chat.completion", "choices": [choice], "usage": usage}
    return Said(200, json.dumps(body).encode())


def failed(status: int, message: str = "it went wrong", headers: dict[str, str] | None = None, **error: str) -> Said:
    """An error as the protocol has it."""
    body = json.dumps({"error": {"message": message, "type": "some_error", **error}}).encode()
    return Said(status, body, {"Content-Type": "application/json", **(headers or {})})


class Stub:
    """What the server is asked, and what it answers."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.url, self._lock = answers, "", threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Said:
        """The answer to one request, which is kept."""
        with self._lock:
            self.paths.append(path)
            self.headers.append(headers)
            self.asked.append(body)
        return self.answers(body)


def in_turn(*answers: Said) -> Answers:
    """One after the other; the last one goes on for ever."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


@contextmanager
def serving(answers: Answers) -> Iterator[Stub]:
    """The server while it runs."""
    stub = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            found = stub.answer(self.path, dict(self.headers), json.loads(self.rfile.read(length)))
            with suppress(OSError):  # whoever asked may have gone
                self._send(found)

        def _send(self, found: Said) -> None:
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(found.length if found.length is not None else len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)
            self.close_connection = found.length is not None or self.close_connection

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def text_between(body: dict[str, Any], start: str, end: str) -> str:
    """What stands between two lines of the first message."""
    lines = body["messages"][0]["content"].splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.endswith(f" {mark} -----")) for mark in (start, end))
    return "\n".join(lines[first + 1 : last])


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The answers in a request, in their order."""
    return text_between(body, "answer 1", "answer 2"), text_between(body, "answer 2", "end")
