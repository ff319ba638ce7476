"""What reaches stderr past `console.py`: wrong usage, and what libraries say.

Knows a stream. Invariant: no secret passes.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast

from qlora_cli.secrets import redact


class _WithoutSecrets:
    """A stream whose text is redacted, piece by piece."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def clean_stderr() -> contextlib.AbstractContextManager[Any]:
    """Within it, what Typer says of wrong usage and libraries of anything tells no secret either."""
    return contextlib.redirect_stderr(cast(TextIO, _WithoutSecrets(sys.stderr)))
