"""What libraries write to stdout while processes find each other is no result."""

from __future__ import annotations

import os

import pytest

from qlora_cli.model.ranks import clean_stdout


@pytest.mark.parametrize(("processes", "on_stdout"), [("1", "connected"), ("2", "")])
def test_with_several_processes_words_of_libraries_go_to_stderr(
    processes: str, on_stdout: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with clean_stdout():
        os.write(1, b"connected")
    os.write(1, b" result")
    out, err = capfd.readouterr()
    assert (out, err) == (f"{on_stdout} result", "" if on_stdout else "connected")
