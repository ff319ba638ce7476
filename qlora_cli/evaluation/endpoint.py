"""An OpenAI-compatible endpoint: messages in, one reply out.

Knows HTTP and the JSON of POST {base}/chat/completions; nothing of what is asked. Invariant: no text that leaves here,
error or reply, holds the key; and a request is repeated only where another try may go better.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPErrorProcessor, Request, build_opener

from qlora_cli.errors import MachineError
from qlora_cli.evaluation.address import KEYS, PATH, Address

MARK, LEAST, TELLING = "[secret]", 8, 12
"""Shorter keys (`EMPTY`, `x`) are words that local servers are given; so many characters tell one that was cut."""
LARGEST = 1 << 24
PASSING = frozenset({408, 409, 425, 429})
"""Statuses, with all from 500, behind which a later try may go well."""
GO_ON = "run the same command again later; what is there is not asked again"
Message = Mapping[str, str]


class RefusedError(MachineError):
    """The endpoint does not take this one request; others it may."""


class _PassingError(Exception):
    """A failure that may not come again; `wait` seconds is what the endpoint asks for."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """Seconds for one try; how many tries; seconds before the second, doubled for each further; and the longest wait
    that an endpoint may ask for."""

    timeout: float = 120.0
    tries: int = 6
    backoff: float = 1.0
    longest: float = 120.0


@dataclass(frozen=True)
class Reply:
    """What was said, why it ended, and the tokens that the endpoint counted (0 where it does not tell)."""

    text: str
    finish: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


class _AsItIs(HTTPErrorProcessor):
    """Every status comes as a response: nothing is raised, and no redirection followed, which would take the key
    elsewhere."""

    def http_response(self, request: Request, response: Any) -> Any:
        return response

    https_response = http_response


class Endpoint:
    """Asks one model. Threads may share it; `tell` is given each failure that is tried again."""

    def __init__(self, address: Address, model: str, patience: Patience, max_tokens: int) -> None:
        self._address, self._model, self._patience = address, model, patience
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self._opener, self._stopped, self._reached = build_opener(_AsItIs), threading.Event(), False
        self.tell: Callable[[str], None] = lambda _: None

    def ask(self, messages: Sequence[Message]) -> Reply:
        """The reply. Raises `RefusedError` where this request is not taken, and `MachineError` where none would be."""
        for attempt in range(self._patience.tries):
            try:
                return self._once({"model": self._model, "messages": list(messages), **self._options})
            except _PassingError as error:
                failure = error
            if attempt + 1 < self._patience.tries and not self._may_go_on(attempt, failure):
                break
        raise self._error(f"{failure} (tried {attempt + 1} times)", GO_ON)

    def stop(self) -> None:
        """Ends every wait; nothing is tried again."""
        self._stopped.set()

    def _may_go_on(self, attempt: int, failure: _PassingError) -> bool:
        """Waits. False where everything was stopped meanwhile."""
        seconds = failure.wait if failure.wait is not None else self._patience.backoff * 2**attempt
        if seconds > self._patience.longest:
            raise self._error(f"{failure}, and asks to wait {seconds:,.0f} s", GO_ON)
        self.tell(self._clean(f"{failure}; trying again in {seconds:.3g} s"))
        return not self._stopped.wait(seconds)

    def _once(self, body: dict[str, Any]) -> Reply:
        status, headers, data = self._post(json.dumps(body).encode())
        self._reached = True
        if not 200 <= status < 300:
            raise self._failure(status, headers, data, body)
        try:
            return self._reply(json.loads(data))
        except (ValueError, RecursionError) as error:
            if _is_html(headers, data):
                fix = f"check the base URL: {PATH} is put behind it, and most end in /v1"
                raise self._error("answers with an HTML page instead of JSON", fix) from error
            raise _PassingError(f"answers with what is no JSON: {_start(data)}") from error

    def _post(self, data: bytes) -> tuple[int, HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "qlora"}
        if self._address.key:
            headers["Authorization"] = f"Bearer {self._address.key}"
        request = Request(self._address.url + PATH, data, headers, method="POST")
        until = time.monotonic() + self._patience.timeout
        try:
            with self._opener.open(request, timeout=self._patience.timeout) as response:
                content = _content(response, until)
        except (URLError, HTTPException, OSError) as error:
            raise self._unreachable(error) from error
        return response.status, response.headers, self._clean(content.decode("latin-1")).encode("latin-1")

    def _unreachable(self, error: Exception) -> Exception:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            return _PassingError(f"gave no answer within {self._patience.timeout:g} s")
        failed = "broke off" if isinstance(reason, HTTPException) else "cannot be reached"
        what = f"{failed}: {getattr(reason, 'strerror', None) or reason or type(reason).__name__}"
        plain = isinstance(reason, ConnectionRefusedError | socket.gaierror | ssl.SSLCertVerificationError)
        if plain and not self._reached:  # it is not there at all, rather than gone for a moment
            return self._error(what, "start it, or correct its base URL")
        return _PassingError(what)

    def _failure(self, status: int, headers: HTTPMessage, data: bytes, body: Mapping[str, Any]) -> Exception:
        """What a status that is no success means."""
        error = _error_of(data)
        said = _said(headers, data, error)
        if status in PASSING or status >= 500:
            if error.get("code") == "insufficient_quota":  # OpenAI's word for an account without money
                return self._error(f"has no quota left for this key{said}", "top the account up, or use another key")
            return _PassingError(f"answers HTTP {status}{said}", _retry_after(headers))
        if status == 400 and (option := str(error.get("param"))) in {"temperature", "max_tokens"} & body.keys():
            return self._without(option, said)
        return self._lasting(status, said, headers.get("Location", "nowhere"))

    def _lasting(self, status: int, said: str, place: str) -> MachineError:
        """What another try would not change."""
        if status in {401, 403}:
            whose = "the key" if self._address.key else "a request without a key"
            detail = said if status == 403 else ""  # behind 401 some tell the ends of the key
            return self._error(f"does not accept {whose} (HTTP {status}){detail}", f"set {KEYS[0]} to a key of it")
        if status == 404:
            fix = f"it has no {PATH}, or no model {self._model}: check the base URL (most end in /v1) and --model"
            return self._error(f"answers HTTP 404{said}", fix)
        if status < 400:
            fix = "set the base URL to where it leads, if you trust that with the key"
            return self._error(f"answers HTTP {status} and points to {place}", fix)
        return self._error(f"answers HTTP {status}{said}", "shorten the question, or read what it says", RefusedError)

    def _without(self, option: str, said: str) -> _PassingError:
        """Some models take no temperature, and call the limit of tokens otherwise: from now on as they want it."""
        left = {name: value for name, value in self._options.items() if name != option}
        if option == "max_tokens":
            left.setdefault("max_completion_tokens", self._options.get("max_tokens"))  # unless another thread did
        self._options = left
        return _PassingError(f"takes no {option}{said}", 0.0)

    def _reply(self, value: Any) -> Reply:
        try:
            choice, usage = value["choices"][0], value.get("usage")
            text = choice["message"].get("content")
            usage = usage if isinstance(usage, dict) else {}
            if not isinstance(text, str | None):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            told = _start(json.dumps(value).encode())
            raise _PassingError(f"answers with JSON that is no chat completion: {told}") from error
        whole = (text or "").encode("utf-8", "replace").decode("utf-8")  # JSON may hold halves of characters
        counts = (_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion"))
        return Reply(self._clean(whole), str(choice.get("finish_reason") or ""), *counts)

    def _error(self, what: str, fix: str, kind: type[MachineError] = MachineError) -> MachineError:
        return kind(self._clean(f"the endpoint {self._address.url} {what}"), fix=fix)

    def _clean(self, text: str) -> str:
        key = self._address.key
        text = text.replace(key, MARK) if len(key) >= LEAST else text
        return re.sub(rf"{re.escape(key[:TELLING])}[\w.~+/=*-]*", MARK, text) if len(key) > TELLING else text


def _content(response: HTTPResponse, until: float) -> bytes:
    """All of the body, in time: the timeout of a socket holds for each piece alone."""
    pieces, size, length = [], 0, response.length  # which older versions of Python do not count down
    while (length is None or size < length) and (piece := response.read1(1 << 16)):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise HTTPException(f"more than {LARGEST >> 20} MiB of answer")
        if time.monotonic() > until:
            raise TimeoutError
    if size < (length or 0):
        raise HTTPException("the answer was cut off")
    return b"".join(pieces)


def _retry_after(headers: HTTPMessage) -> float | None:
    """Seconds, from a number or a date."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _error_of(data: bytes) -> dict[str, Any]:
    """The `error` object of a JSON answer; empty where there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


def _said(headers: HTTPMessage, data: bytes, error: Mapping[str, Any]) -> str:
    if isinstance(message := error.get("message"), str):
        return f": {_start(message.encode('utf-8', 'replace'))}"
    return " with an HTML page" if _is_html(headers, data) else f": {_start(data)}" if data.strip() else ""


def _is_html(headers: HTTPMessage, data: bytes) -> bool:
    return headers.get_content_type() == "text/html" or data.lstrip()[:1] == b"<"


def _start(data: bytes) -> str:
    text = " ".join(data[:4096].decode("utf-8", "replace").split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or "nothing"


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
