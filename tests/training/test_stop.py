"""Signals while a run trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_cli.training.stop import ENDING, Stop, StopNowError


@pytest.mark.parametrize("name", ENDING)
def test_a_request_to_end_is_noted_said_and_then_forgotten(name: str) -> None:
    number, told = getattr(signal, name), list[str]()
    before = signal.getsignal(number)
    with Stop(told.append) as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        time.sleep(0)  # where Python runs the handler
        assert stop.asked == number
        assert signal.getsignal(number) is signal.SIG_DFL, "the next one ends the process, whatever it computes"
    assert told == [f"{name}: ending after this step; once more to end without saving"]
    assert signal.getsignal(number) is before


def test_a_request_to_save_can_come_again() -> None:
    told = list[str]()
    with Stop(told.append) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0)
            assert stop.save
            stop.save = False
        assert stop.asked is None
    assert told == ["SIGUSR1: saving a checkpoint after this step"] * 2


def test_what_need_not_be_finished_is_broken_off_at_once_and_only_that() -> None:
    with Stop(lambda text: None) as stop:
        with pytest.raises(StopNowError), stop.impatient():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
            raise AssertionError("the handler raises before this")
        with pytest.raises(StopNowError), stop.impatient():
            raise AssertionError("a request that came before is enough")
        assert stop.asked == signal.SIGTERM


def test_a_signal_that_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(lambda text: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            assert stop.asked is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_request_ends_a_process_that_hears_nothing() -> None:
    code = """
import time, sys
from qlora_cli.training.stop import Stop
with Stop(lambda text: None) as stop:
    print("ready", flush=True)
    while stop.asked is None:
        time.sleep(0.01)
    print("heard", flush=True)
    while True:
        sum(range(10**7))  # one call into C that no handler of Python's interrupts
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        try:
            assert said.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert said.readline() == "heard\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.kill()
            process.wait()
