"""The one shape that stands between a format and a template: messages with roles.

Knows nothing of files, tokenizers or loss masks. Invariant: roles are words that chat templates know, and a
conversation has at least one message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order. Plain text is a conversation of a single assistant turn."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        assert self.messages, "a conversation without messages has no meaning here; formats refuse it"

    def assistant_turns(self) -> tuple[int, ...]:
        """Positions of the turns that the model is to write."""
        return tuple(i for i, message in enumerate(self.messages) if message.role == "assistant")
