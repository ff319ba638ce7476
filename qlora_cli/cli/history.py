"""Line editing and the history of what was typed.

Knows readline and one file. Invariant: the file is readable by its owner only, and whatever fails here never ends a
conversation.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LONGEST = 1000


def history_file() -> Path:
    """Where the lines typed to `qlora chat` are kept. A user without a home gets a place where nothing can be."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    except RuntimeError:
        state = os.devnull
    return Path(state) / "qlora/chat_history"


class History:
    """Lines of earlier conversations, to be found with the arrow keys. Loading readline makes `input` edit lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = 0
        with contextlib.suppress(ImportError, OSError):
            import readline

            _own(path)
            readline.read_history_file(path)
            self._known = readline.get_current_history_length()
            if self._known > LONGEST:
                readline.set_history_length(LONGEST)
                readline.write_history_file(path)

    def keep(self) -> None:
        """Writes down what was typed since the last time."""
        with contextlib.suppress(ImportError, OSError, AttributeError):  # libedit cannot append
            import readline

            typed = readline.get_current_history_length() - self._known
            if typed > 0:
                self._known += typed
                _own(self._path)
                readline.append_history_file(typed, self._path)


def _own(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)
