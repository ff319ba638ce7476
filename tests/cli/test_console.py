"""The console: plain lines, a live line, JSON; and silence in all processes but the first."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from qlora_cli.cli.console import Console, show_error
from qlora_cli.errors import DataError, DeviceMemoryError, Problem


@dataclass(frozen=True)
class Tick:
    """A step, logged or not."""

    step: int
    logged: bool = True

    def line(self) -> str:
        """One line."""
        return f"step {self.step}/3"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"event": "step", "step": self.step, "total": 3}


def test_without_a_terminal_only_logged_steps_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        for tick in (Tick(1), Tick(2, logged=False), Tick(3)):
            console(tick)
        console.result("path", {"event": "result"})
    captured = capsys.readouterr()
    assert captured.err == "step 1/3\nstep 3/3\n"
    assert captured.out == "path\n"


def test_json_prints_every_event_on_stdout_and_nothing_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console(Tick(1, logged=False))
    console.result("path", {"event": "result"})
    captured = capsys.readouterr()
    assert [json.loads(line)["event"] for line in captured.out.splitlines()] == ["step", "result"]
    assert captured.err == ""


def test_processes_other_than_the_first_are_silent_but_for_their_own_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for as_json in (False, True):
        console = Console(as_json)
        console(Tick(1))
        console.result("path", {"event": "result"})
    show_error(DataError("rows"))
    assert capsys.readouterr() == ("", "")
    show_error(DeviceMemoryError("memory"))
    assert capsys.readouterr().err == "error: memory\n"


def test_all_problems_are_shown_with_place_why_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(DataError.of([Problem("one", "because", "do this", "a:1:2"), Problem("two")]))
    expected = "error: a:1:2: one\n  why: because\n  fix: do this\nerror: two\n"
    assert capsys.readouterr().err == expected


def test_on_a_terminal_steps_share_one_live_line() -> None:
    script = (
        "import time\nfrom tests.cli.test_console import Tick\nfrom qlora_cli.cli.console import Console\n"
        "with Console() as console:\n"
        "    for i in (1, 2, 3):\n        console(Tick(i, logged=False))\n        time.sleep(0.3)\n"
    )
    parent, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", script], stderr=terminal, env=environment)
    child.wait(timeout=60)
    os.close(terminal)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert "step 3/3" in shown
    assert "\r" in shown
