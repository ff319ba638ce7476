"""The client of an OpenAI-compatible endpoint, against a server that speaks the protocol well and badly."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.client import HTTPMessage
from typing import Any

import pytest

from qlora_cli.errors import MachineError
from qlora_cli.evaluation.address import Address, find_address
from qlora_cli.evaluation.endpoint import Endpoint, Patience, RefusedError, _retry_after
from tests.evaluation.judge_stub import HTML, KEY, Answers, Said, Stub, failed, in_turn, said, serving

QUICK = Patience(timeout=5, tries=3, backoff=0.001, longest=1)
MESSAGES = [{"role": "user", "content": "which?"}]
JSON = {"Content-Type": "application/json"}
GOOD = said("Verdict: 1")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub is on this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


Serve = Callable[..., tuple[Endpoint, Stub]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server and makes an endpoint of it."""
    running: list[Any] = []

    def start(answers: Answers, patience: Patience = QUICK, key: str = KEY) -> tuple[Endpoint, Stub]:
        running.append(serving(answers))
        stub = running[-1].__enter__()
        return Endpoint(Address(stub.url, key), "judge-1", patience, 64), stub

    yield start
    for each in running:
        each.__exit__(None, None, None)


def refusal(endpoint: Endpoint) -> MachineError:
    """The error of a request, which says nothing of the key."""
    with pytest.raises(MachineError) as caught:
        endpoint.ask(MESSAGES)
    assert KEY not in str(caught.value)
    assert KEY[:14] not in str(caught.value)
    return caught.value


def test_a_request_is_what_the_protocol_wants_and_the_reply_has_text_and_counts(serve: Serve) -> None:
    endpoint, stub = serve(lambda _: GOOD)
    reply = endpoint.ask(MESSAGES)
    assert (reply.text, reply.finish, reply.tokens_in, reply.tokens_out) == ("Verdict: 1", "stop", 100, 10)
    assert stub.asked == [{"model": "judge-1", "messages": MESSAGES, "temperature": 0, "max_tokens": 64}]
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert stub.headers[0]["Content-Type"] == "application/json"


def test_without_a_key_no_authorization_is_sent(serve: Serve) -> None:
    endpoint, stub = serve(lambda _: GOOD, key="")
    endpoint.ask(MESSAGES)
    assert "Authorization" not in stub.headers[0]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_failure_that_may_pass_is_tried_again_and_told(serve: Serve, status: int) -> None:
    endpoint, stub = serve(in_turn(failed(status, "busy now"), GOOD))
    told: list[str] = []
    endpoint.tell = told.append
    assert endpoint.ask(MESSAGES).text == "Verdict: 1"
    assert len(stub.asked) == 2
    assert told == [f"answers HTTP {status}: busy now; trying again in 0.001 s"]


def test_waits_double_and_after_the_last_try_the_error_says_what_came_back(serve: Serve) -> None:
    endpoint, stub = serve(lambda _: Said(503, HTML, {"Content-Type": "text/html"}))
    told: list[str] = []
    endpoint.tell = told.append
    error = refusal(endpoint)
    assert "answers HTTP 503 with an HTML page (tried 3 times)" in str(error)
    assert "run the same command again later" in str(error)
    assert [each.rsplit(" ", 2)[1] for each in told] == ["0.001", "0.002"]
    assert len(stub.asked) == 3


def test_retry_after_takes_the_place_of_the_back_off(serve: Serve) -> None:
    endpoint, stub = serve(in_turn(failed(429, headers={"Retry-After": "0"}), GOOD), Patience(5, 3, backoff=60))
    assert endpoint.ask(MESSAGES).text == "Verdict: 1"
    assert len(stub.asked) == 2


def test_a_wait_longer_than_allowed_is_an_error_at_once(serve: Serve) -> None:
    endpoint, stub = serve(lambda _: failed(429, headers={"Retry-After": "3600"}))
    assert "asks to wait 3,600 s" in str(refusal(endpoint))
    assert len(stub.asked) == 1


def test_retry_after_may_be_seconds_or_a_date_and_nothing_else() -> None:
    cases = {"7": 7.0, "0.5": 0.5, "soon": None, "-3": None, "": None, "\u0661": None, "9" * 400: None}
    assert cases
    for text, seconds in cases.items():
        headers = HTTPMessage()
        headers["Retry-After"] = text
        assert _retry_after(headers) == seconds, text
    headers = HTTPMessage()
    headers["Retry-After"] = formatdate(time.time() + 500, usegmt=True)
    assert 400 < (_retry_after(headers) or 0) <= 500


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failed(401, f"Incorrect API key provided: {KEY[:20]}****"), "does not accept the key (HTTP 401)"),
        (failed(403, f"no access with {KEY}"), "does not accept the key (HTTP 403): no access with [secret]"),
        (failed(404, "no model judge-1"), "answers HTTP 404: no model judge-1"),
        (failed(429, "pay first", code="insufficient_quota"), "has no quota left for this key: pay first"),
        (Said(302, b"", {"Location": "https://else.test/v1"}), "HTTP 302 and points to https://else.test/v1"),
        (Said(200, HTML, {"Content-Type": "text/html"}), "answers with an HTML page instead of JSON"),
        (Said(200, HTML, {"Content-Type": "application/json"}), "answers with an HTML page instead of JSON"),
    ],
)
def test_what_another_try_would_not_change_is_one_error_at_once(serve: Serve, answer: Said, words: str) -> None:
    endpoint, stub = serve(lambda _: answer)
    error = refusal(endpoint)
    assert words in str(error)
    assert not isinstance(error, RefusedError)
    assert error.problems[0].fix
    assert len(stub.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_not_taken_is_an_error_of_its_own(serve: Serve, status: int) -> None:
    endpoint, stub = serve(lambda _: failed(status, "too long"))
    assert isinstance(refusal(endpoint), RefusedError)
    assert len(stub.asked) == 1


MALFORMED = [
    Said(200, b"", JSON),
    Said(200, b'{"choices": [{"mess', JSON),
    Said(200, b"\xff\xfe{}", JSON),
    Said(200, b"[" * 100_000, JSON),
    Said(200, b"[]", JSON),
    Said(200, b"{}", JSON),
    Said(200, b'{"choices": []}', JSON),
    Said(200, b'{"choices": null}', JSON),
    Said(200, b'{"choices": [{"text": "x"}]}', JSON),
    Said(200, b'{"choices": [{"message": {"content": 5}}]}', JSON),
    Said(200, b'{"error": {"message": "overloaded"}}', JSON),
    Said(200, b'{"choices"', JSON, length=4000),
]


@pytest.mark.parametrize("answer", MALFORMED)
def test_a_malformed_answer_is_tried_again_and_then_an_error(serve: Serve, answer: Said) -> None:
    endpoint, stub = serve(in_turn(answer, GOOD))
    assert endpoint.ask(MESSAGES).text == "Verdict: 1"
    assert len(stub.asked) == 2
    endpoint, stub = serve(lambda _: answer)
    assert "(tried 3 times)" in str(refusal(endpoint))
    assert len(stub.asked) == 3


def test_an_answer_that_breaks_off_is_none_even_where_it_could_be_read(serve: Serve) -> None:
    endpoint, _ = serve(lambda _: Said(200, GOOD.body, JSON, length=len(GOOD.body) + 1))
    assert "broke off: the answer was cut off" in str(refusal(endpoint))


def test_behind_a_wrong_key_nothing_is_quoted_that_may_show_its_ends(serve: Serve) -> None:
    endpoint, _ = serve(lambda _: failed(401, f"Incorrect API key provided: {KEY[:4]}****{KEY[-4:]}"))
    assert "Incorrect" not in str(refusal(endpoint))


@pytest.mark.parametrize("usage", [b"null", b"5", b'{"prompt_tokens": "many", "completion_tokens": -1}'])
def test_a_reply_counts_without_sensible_usage_or_content(serve: Serve, usage: bytes) -> None:
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": null}], "usage": ' + usage + b"}"
    endpoint, _ = serve(lambda _: Said(200, body, JSON))
    reply = endpoint.ask(MESSAGES)
    assert (reply.text, reply.finish, reply.tokens_in, reply.tokens_out) == ("", "", 0, 0)


def test_a_reply_holds_neither_the_key_nor_half_a_character(serve: Serve) -> None:
    body = b'{"choices": [{"message": {"content": "\\ud800 ' + KEY.encode() + b'"}}]}'
    endpoint, _ = serve(lambda _: Said(200, body, JSON))
    assert endpoint.ask(MESSAGES).text == "? [secret]"


def test_a_key_at_the_cut_of_a_long_message_does_not_show_its_beginning(serve: Serve) -> None:
    endpoint, _ = serve(lambda _: failed(400, "x" * 190 + KEY))
    assert KEY[:6] not in str(refusal(endpoint))


def test_an_endpoint_that_does_not_answer_in_time_is_tried_again_and_then_an_error(serve: Serve) -> None:
    free = threading.Event()

    def slow(_: Any) -> Said:
        free.wait(10)
        return GOOD

    endpoint, stub = serve(slow, Patience(timeout=0.03, tries=2, backoff=0.001))
    try:
        assert "gave no answer within 0.03 s (tried 2 times)" in str(refusal(endpoint))
    finally:
        free.set()
    assert len(stub.asked) == 2


def test_an_endpoint_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets this port, and nobody answers
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        endpoint = Endpoint(Address(url, KEY), "judge-1", Patience(5, tries=5, backoff=60), 64)
        assert f"{url} cannot be reached: Connection refused" in str(refusal(endpoint))


def test_a_model_that_names_its_limits_otherwise_is_asked_as_it_wants(serve: Serve) -> None:
    def newer(body: dict[str, Any]) -> Said:
        unknown = next((name for name in ("max_tokens", "temperature") if name in body), None)
        return failed(400, f"no {unknown}", param=unknown, code="unsupported_parameter") if unknown else GOOD

    endpoint, stub = serve(newer)
    assert endpoint.ask(MESSAGES).text == "Verdict: 1"
    assert stub.asked[-1] == {"model": "judge-1", "messages": MESSAGES, "max_completion_tokens": 64}
    endpoint.ask(MESSAGES)
    assert len(stub.asked) == 4


def test_a_stopped_endpoint_waits_no_longer(serve: Serve) -> None:
    endpoint, stub = serve(lambda _: failed(500), Patience(5, tries=5, backoff=60))
    endpoint.tell = lambda _: endpoint.stop()
    assert "(tried 1 times)" in str(refusal(endpoint))
    assert len(stub.asked) == 1


def test_the_environment_names_url_and_key() -> None:
    both = {"OPENAI_BASE_URL": "https://two.test/v1", "OPENAI_API_KEY": "second-key"}
    cases: list[tuple[dict[str, str], Address]] = [
        ({"QLORA_JUDGE_URL": " http://one.test:8000/v1/ "}, Address("http://one.test:8000/v1")),
        ({"QLORA_JUDGE_URL": "http://one.test/v1/chat/completions"}, Address("http://one.test/v1")),
        ({"QLORA_JUDGE_URL": "http://one.test", "QLORA_JUDGE_KEY": "k\n"}, Address("http://one.test", "k")),
        (both, Address("https://two.test/v1", "second-key")),
        ({**both, "QLORA_JUDGE_KEY": "own"}, Address("https://two.test/v1", "own")),
        ({**both, "QLORA_JUDGE_URL": "http://one.test"}, Address("http://one.test")),  # no key of another place
    ]
    assert cases
    for environment, address in cases:
        assert find_address(environment) == address
    assert "second-key" not in repr(Address("https://two.test", "second-key"))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"QLORA_JUDGE_URL": "  "},
        {"QLORA_JUDGE_URL": "one.test/v1"},
        {"QLORA_JUDGE_URL": "ftp://one.test"},
        {"QLORA_JUDGE_URL": "http://"},
        {"QLORA_JUDGE_URL": "http://one.test:port/v1"},
        {"QLORA_JUDGE_URL": "http://[one/v1"},
        {"QLORA_JUDGE_URL": f"http://me:{KEY}@one.test/v1"},
        {"QLORA_JUDGE_URL": "http://one.test/v1?x=1"},
        {"QLORA_JUDGE_URL": "http://one.test/a b"},
        {"QLORA_JUDGE_URL": "http://one.test/v1", "QLORA_JUDGE_KEY": f"{KEY}\nX-Header: 1"},
        {"QLORA_JUDGE_URL": "http://one.test/v1", "QLORA_JUDGE_KEY": "schlüssel"},
    ],
)
def test_an_environment_that_names_no_endpoint_is_refused_without_its_secrets(environment: dict[str, str]) -> None:
    with pytest.raises(MachineError) as caught:
        find_address(environment)
    assert KEY not in str(caught.value)
    assert caught.value.problems[0].fix


def test_a_key_on_an_open_network_is_told_from_one_that_stays_here() -> None:
    open_ones = {"http://one.test/v1": True, "https://one.test/v1": False, "http://127.0.0.1:8000/v1": False}
    assert {url: Address(url, KEY).in_the_open for url in open_ones} == open_ones
    assert not Address("http://one.test/v1").in_the_open
