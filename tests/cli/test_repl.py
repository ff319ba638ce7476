"""A conversation at a terminal: commands, mistakes and Ctrl-C, none of which ends it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from qlora_cli.cli.app import main
from qlora_cli.cli.console import Console
from qlora_cli.cli.history import History, history_file
from qlora_cli.cli.options import Storage
from qlora_cli.cli.repl import BASE, COMMANDS, Repl
from qlora_cli.cli.settings import SETTINGS, parse_setting
from qlora_cli.cli.signals import end_on_signals, interruption
from qlora_cli.generation.sampling import check_logits
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.workflows import chat
from qlora_cli.workflows.chat import Decoding, open_talk
from tests.conftest import save_base
from tests.workflows.test_chat import GIBBERISH, ignore, train

Capture = pytest.CaptureFixture[str]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that talks without end."""
    folder = tmp_path_factory.mktemp("talkative")
    return save_base(folder, seed=12, max_position_embeddings=100_000, **GIBBERISH)


@pytest.fixture
def repl(talkative: Path, capsys: Capture) -> Repl:
    """A session about to begin."""
    found = Repl(open_talk(str(talkative), None, ignore), Console(), Decoding(max_new_tokens=5))
    capsys.readouterr()
    return found


def after(repl: Repl, line: str, capsys: Capture) -> str:
    """What a line brings about on stderr."""
    repl.take(line)
    return capsys.readouterr().err


def test_the_settings_are_the_fields_of_decoding_and_the_ways_to_load_those_of_the_schema() -> None:
    assert set(SETTINGS) == {field.name for field in fields(Decoding)}
    kinds = {field.name: type(field.default) for field in fields(Decoding)}
    assert {name: setting.kind for name, setting in SETTINGS.items()} == kinds
    schema = QuantizationSection.model_json_schema()["properties"]["type"]["enum"]
    assert {each.value for each in Storage} == {"auto", *schema}
    assert BASE == chat.BASE


def test_every_command_is_in_the_help(repl: Repl, capsys: Capture) -> None:
    listed = re.findall(r"^/(\w+)", after(repl, "/help", capsys), re.MULTILINE)
    expected = ["help", "reset", "system", "set", "retry", "undo", "save", "adapter", "base", "compare", "exit"]
    assert listed == list(COMMANDS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature=0.7", ("temperature", 0.7)),
        (" top_p = 1 ", ("top_p", 1.0)),
        ("top_k=40", ("top_k", 40)),
        ("min_p=0", ("min_p", 0.0)),
        ("repetition_penalty=1e-1", ("repetition_penalty", 0.1)),
        ("max_new_tokens=1", ("max_new_tokens", 1)),
        ("seed=4294967295", ("seed", 4294967295)),
    ],
)
def test_a_setting_is_a_number_of_its_own_type(text: str, expected: tuple[str, Any]) -> None:
    found = parse_setting(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature=1", "did you mean temperature?"),
        ("temperature", "write KEY=VALUE"),
        ("temperature=warm", "temperature: 'warm' is not a number from 0.01 to 100, or 0"),
        ("temperature=nan", "temperature: nan is not"),
        ("temperature=inf", "temperature: inf is not"),
        ("temperature=-0.1", "temperature: -0.1 is not"),
        ("temperature=1e-300", "temperature: 1e-300 is not a number from 0.01 to 100, or 0"),
        ("repetition_penalty=1e-300", "repetition_penalty: 1e-300 is not a number from 0.1 to 100"),
        ("repetition_penalty=0", "repetition_penalty: 0 is not"),
        ("top_p=0", "top_p: 0 is not a number above 0 to 1"),
        ("top_k=1.5", "top_k: '1.5' is not a whole number from 0"),
        ("max_new_tokens=0", "max_new_tokens: 0 is not a whole number from 1"),
        ("seed=4294967296", "is not a whole number from 0 to 4,294,967,295"),
        ("", "write KEY=VALUE"),
    ],
)
def test_a_bad_setting_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(said)) as caught:
        parse_setting(text)
    assert "\n" not in caught.value.message


def test_a_line_of_settings_is_taken_whole_or_not_at_all(repl: Repl, capsys: Capture) -> None:
    assert "temperature=0  top_p=1  top_k=0" in after(repl, "/set", capsys)
    assert "top_p: 2 is not" in after(repl, "/set temperature=1 top_p=2", capsys)
    assert repl.decoding == Decoding(max_new_tokens=5)
    assert after(repl, "/set temperature=0.5 seed=3", capsys) == "temperature=0.5  seed=3\n"
    assert repl.decoding == Decoding(max_new_tokens=5, temperature=0.5, seed=3)
    after(repl, "/set temperature=0", capsys)
    assert "top_k without effect" in after(repl, "/set top_k=2", capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rety", "error: /rety is no command; did you mean /retry?"),
        ("/nonsense", "there is /help, /reset"),
        ("/exit now", "error: /exit takes nothing (got now)"),
        ("/retry", "error: there is nothing to answer again yet"),
        ("/undo", "error: there is nothing to take back yet"),
        ("/compare", "error: there is nothing to compare yet"),
        ("/save", "error: name a file"),
        ("/save x.jsonl", "error: not saved: nothing was said yet"),
        ("/adapter x", "error: there is no adapter x; none was loaded (--adapter DIR)"),
        ("/set x", "error: write KEY=VALUE"),
        ("half \udc80", "error: the text is not Unicode"),
    ],
)
def test_a_mistake_is_said_and_the_session_goes_on(repl: Repl, line: str, said: str, capsys: Capture) -> None:
    assert said in after(repl, line, capsys)
    assert "5 tokens" in after(repl, "q", capsys)


def test_a_turn_is_answered_with_its_figures_and_the_limit_that_cut_it(repl: Repl, capsys: Capture) -> None:
    repl.take("q")
    first = capsys.readouterr()
    assert first.out.endswith("\n")
    assert re.match(r"5 tokens, [\d.,]+ tokens/s, first after [\d.]+ s; 0 of \d+ prompt tokens reused; ", first.err)
    assert first.err.endswith("stopped at 5 tokens (max_new_tokens)\n")
    assert not after(repl, "  ", capsys)
    repl.take("//path is no command")
    assert re.search(r"; [1-9]\d* of \d+ prompt tokens reused", capsys.readouterr().err)
    assert after(repl, "/undo", capsys) == "taken back: /path is no command\n"


class Planted:
    """A model that fails once, as `fail` does, and then is itself again."""

    def __init__(self, model: Any, fail: Callable[[], None]) -> None:
        self._model, self._fail = model, fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        fail, self._fail = self._fail, lambda: None
        fail()
        return self._model(**inputs)


def swallowed(number: int) -> None:
    """What a library's native code makes of an exception that a signal raised."""
    try:
        signal.raise_signal(number)
    except BaseException as error:
        raise ValueError("could not determine the shape") from error


def fail_in_kernel() -> None:
    raise RuntimeError("a kernel failed")


def test_a_failed_turn_of_any_kind_leaves_session_and_conversation(repl: Repl, capsys: Capture) -> None:
    repl.take("q")
    said = repl._talk.history
    for fail, shown in (
        (fail_in_kernel, "RuntimeError: a kernel failed"),
        (lambda: check_logits(torch.tensor([torch.nan])), "error: the model's logits are not finite numbers\n  why"),
    ):
        decoder = repl._talk.voices._decoder
        assert decoder is not None
        whole, decoder._model = decoder._model, Planted(decoder._model, fail)
        assert shown in after(repl, "q2", capsys)
        assert repl._talk.history == said
        decoder._model = whole
    assert "5 tokens" in after(repl, "q3", capsys)


@pytest.fixture
def signals_end() -> Iterator[None]:
    """Signals are handled as `main` has them handled, until the test ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    end_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_that_a_library_swallowed_stops_the_turn_and_a_request_to_end_the_session(
    repl: Repl, capsys: Capture, signals_end: None
) -> None:
    repl.take("q")
    decoder = repl._talk.voices._decoder
    assert decoder is not None
    decoder._model = Planted(decoder._model, lambda: swallowed(signal.SIGINT))
    assert after(repl, "q2", capsys).endswith("stopped: the conversation is as it was\n")
    assert interruption() is None
    decoder._model = Planted(decoder._model, lambda: swallowed(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        repl.take("q3")
    assert end.value.code == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_a_library_swallowed_still_ends_the_command(
    talkative: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture, signals_end: None
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: swallowed(number))
    assert main(["chat", str(talkative), "-p", "q"]) == code
    said = capsys.readouterr().err
    assert said.endswith("interrupted\n")
    assert "error" not in said
    monkeypatch.undo()
    assert main(["chat", str(talkative), "-p", "q", "--max-new-tokens", "1", "-q"]) == 0


def test_an_ignored_ctrl_c_stays_ignored(signals_end: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_on_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_closed_stdin_is_an_empty_one(talkative: Path) -> None:
    command = f"{sys.executable} -m qlora_cli chat {talkative} -q <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stdin_that_cannot_be_read_is_an_error(talkative: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m qlora_cli chat {talkative} -q 0> {tmp_path}/x"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: stdin cannot be read")


def test_commands_change_what_is_said_next(repl: Repl, tmp_path: Path, capsys: Capture) -> None:
    repl.take("q")
    whole = capsys.readouterr().out
    repl.take("/retry")
    assert capsys.readouterr().out == whole
    assert after(repl, "/system be brief", capsys) == "system message: be brief\n"
    assert after(repl, f"/save {tmp_path / 'x.jsonl'}", capsys).startswith("written to new")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert "cannot write" in after(repl, f"/save {tmp_path / 'none/x.jsonl'}", capsys)
    assert "with the same system message" in after(repl, "/reset", capsys)
    assert after(repl, "/system none", capsys) == "system message: none\n"
    repl.take("q")
    assert capsys.readouterr().out == whole
    assert after(repl, "/adapter", capsys) == "* base\n"


def test_adapters_are_listed_switched_and_compared(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    runs = [train(recipe_file(), tmp_path / name, "-s", f"lora.r={r}") for name, r in (("one", 2), ("two", 4))]
    repl = Repl(open_talk(None, runs, ignore), Console(), Decoding(max_new_tokens=3))
    capsys.readouterr()
    assert after(repl, "/adapter", capsys) == "  base\n* one\n  two\n"
    assert "there is no adapter tow; did you mean two?" in after(repl, "/adapter tow", capsys)
    assert "/adapter takes one name (got extra behind two)" in after(repl, "/adapter two  extra", capsys)
    assert after(repl, "/adapter", capsys) == "  base\n* one\n  two\n"
    after(repl, "/adapter two", capsys)
    assert after(repl, "/adapter", capsys) == "  base\n  one\n* two\n"
    after(repl, "/base", capsys)
    assert after(repl, "/adapter", capsys) == "* base\n  one\n  two\n"
    repl.take("q1")
    repl.take("/compare")
    captured = capsys.readouterr()
    assert all(name in captured.out for name in ("base", "one", "two"))
    assert [name in captured.err for name in ("base: ", "one: ", "two: ")] == [True] * 3
    assert after(repl, "/adapter", capsys) == "* base\n  one\n  two\n"


@pytest.mark.parametrize(("width", "stacked"), [("200", False), ("20", True)])
def test_compare_shows_columns_where_they_are_wide_enough(
    repl: Repl, width: str, stacked: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    Console().side_by_side({"base": "[b]one[/b]", "other": "two"})
    shown = capsys.readouterr().out
    assert (shown == "--- base\n[b]one[/b]\n--- other\ntwo\n") == stacked
    assert "[b]one[/b]" in shown
    assert any("base" in line and "other" in line for line in shown.splitlines()) != stacked
    repl.take("q")
    capsys.readouterr()
    repl.take("/compare")
    assert "base: 5 tokens" in capsys.readouterr().err


def test_the_history_is_the_owners_alone_and_where_it_cannot_be_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_file()
    assert path == tmp_path / "state/qlora/chat_history"
    History(path).keep()
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    History(tmp_path / "file/below").keep()
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local/state/qlora/chat_history"


class Terminal:
    """A qlora on a terminal of its own, and who types there."""

    def __init__(self, state: Path, *arguments: str) -> None:
        self.shown, self._seen = "", 0
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(state), "COLUMNS": "80"}
            os.execve(sys.executable, [sys.executable, "-m", "qlora_cli", *arguments], environment)

    def read(self, seconds: float) -> str:
        """What appears within some time, or sooner; empty when the program has ended."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return ""
        try:
            return os.read(self._terminal, 65536).decode("utf-8", "replace")
        except OSError:
            return ""

    def until(self, text: str) -> str:
        """Waits for `text`; returns what was shown from the end of the last one awaited to the end of this."""
        started = time.monotonic()
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < started + PATIENCE, f"{text!r} did not come: {self.shown[self._seen :]!r}"
            self.shown += self.read(1.0)
        begin, self._seen = self._seen, self.shown.index(text, self._seen) + len(text)
        return self.shown[begin : self._seen]

    def type(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._terminal, keys.encode())

    def interrupt(self, text: str) -> None:
        """Presses Ctrl-C until `text` appears. CPython's readline loses a signal that comes between its reads, until
        the next key."""
        for _ in range(10):
            self.type("\x03")
            pressed = time.monotonic()
            while text not in self.shown[self._seen :] and time.monotonic() < pressed + 3:
                self.shown += self.read(0.5)
            if text in self.shown[self._seen :]:
                break
        self.until(text)

    def end(self) -> int:
        """The exit code."""
        while self.read(PATIENCE):
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])


@pytest.fixture
def terminal(talkative: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A session with the talkative base that has come to its first prompt."""
    found = Terminal(tmp_path, "chat", str(talkative), "--max-new-tokens", "90000")
    found.until("\n> ")
    yield found


def test_a_session_on_a_terminal_from_the_first_prompt_to_ctrl_d(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("q\r")
    terminal.until("q\r\n")
    while len(terminal.shown.rpartition("q\r\n")[2]) < 100:
        terminal.shown += terminal.read(PATIENCE)
    terminal.type("\x03")
    figures = terminal.until("\n> ")
    assert "stopped by you after" in figures
    assert "\x1b[2m" in figures
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt("\n> ")
    terminal.type("/set max_new_tokens=3\r")
    terminal.until("max_new_tokens=3\r\n> ")
    terminal.type("one \\\r")
    terminal.until(". ")
    terminal.type("two\r")
    assert "stopped at 3 tokens (max_new_tokens)" in terminal.until("\n> ")
    terminal.type("/undo\r")
    assert "taken back: one \r\ntwo" in terminal.until("\n> ")
    terminal.type("/retry\r")
    terminal.until("stopped at 3 tokens")
    terminal.until("\n> ")
    terminal.type("\x1b[A\x1b[A\r")  # two lines up in the history: /undo
    assert "taken back: q" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    history = tmp_path / "qlora/chat_history"
    assert history.read_text().splitlines() == [
        "q",
        "/set max_new_tokens=3",
        "one \\",
        "two",
        "/undo",
        "/retry",
        "/undo",
    ]
    assert history.stat().st_mode & 0o777 == 0o600


def test_control_characters_of_a_model_do_not_reach_the_terminal(terminal: Terminal) -> None:
    terminal.type("/set max_new_tokens=100\r")
    terminal.until("max_new_tokens=100\r\n")
    terminal.until("\n> ")
    terminal.type("hello\r")
    answer = terminal.until("100 tokens").partition("hello\r\n")[2].partition("\x1b[2m")[0]
    assert len(answer) > 50
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", answer)
    assert re.search("[\u2400-\u2421]", answer)
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_a_file_on_stdout_gets_the_answers_alone(talkative: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["chat", str(talkative), "-p", "q", "--max-new-tokens", "5"]) == 0
    expected = capsys.readouterr().out
    command = f"{sys.executable} -m qlora_cli chat {talkative} --max-new-tokens 5 > {tmp_path}/out"
    script = ["-c", f"import subprocess; subprocess.run({command!r}, shell=True, check=True)"]
    child, end = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, *script], {**os.environ, "XDG_STATE_HOME": str(tmp_path)})
    shown = ""
    for wanted, keys in (("> ", "q\n"), ("max_new_tokens)", "\x04")):
        while wanted not in shown:
            shown += os.read(end, 65536).decode()
        os.write(end, keys.encode())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(end)
    assert (tmp_path / "out").read_text() == expected
