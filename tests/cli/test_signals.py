"""Signals outside of a training loop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from qlora_cli.cli.signals import end_on_signals, interruption

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Puts the handlers back."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def test_a_request_for_a_checkpoint_ends_nothing_where_nothing_trains_yet() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # which ends a process
    end_on_signals()
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0)
    assert interruption() is None


def test_one_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_on_signals()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_request_to_end_ends_at_once_with_its_code(name: str, code: int) -> None:
    end_on_signals()
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0)
    assert caught.value.code == code == interruption()
    end_on_signals()
