"""Text from tokens, piece by piece.

Knows how a tokenizer decodes. Invariant: the pieces together are what it makes of all the tokens (a SentencePiece one
takes back what it said before bytes that are no character; a stream cannot); a piece never ends within a character; and
the cost of a token does not grow with those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
WINDOW = 32


class TextStream:
    """Decodes a window of the last tokens; what lies before it is shown, and can no longer change."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._text = decode
        self._ids: list[int] = []
        self._shown = 0
        self._longest = WINDOW

    def add(self, token: int) -> str:
        """What can be shown now and could not before; empty within a character."""
        self._ids.append(token)
        text = self._text(self._ids)
        if text.endswith(HALF_A_CHARACTER):
            return ""
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        if len(self._ids) >= self._longest:
            self._settle(text)
        return piece

    def rest(self) -> str:
        """What the last tokens left open: part of a character, of which nothing more will come."""
        text = self._text(self._ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _settle(self, text: str) -> None:
        """Cuts the window, all of which is shown, where what is left still reads as the end of it."""
        for cut in range(len(self._ids) // 2, len(self._ids) - 1):
            after = self._text(self._ids[cut:])
            if after and text.endswith(after):
                self._ids, self._shown, self._longest = self._ids[cut:], len(after), WINDOW
                return
        self._longest = 2 * len(self._ids)
