"""The one shape that stands between a format and a template: messages with roles.

Knows nothing of files, tokenizers or loss masks. Invariant: roles are words that chat templates know, and a
conversation has at least one message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. `extra` are fields that go to the template as they are (`tool_calls`, `tool_call_id`, `name`,
    `reasoning_content`); `train` False: the turn carries no loss."""

    role: Role
    content: str
    train: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What a chat template is given."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools that the model is told of. Plain text is a conversation of a single assistant
    turn."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        assert self.messages, "a conversation without messages has no meaning here; formats refuse it"

    def assistant_turns(self) -> tuple[int, ...]:
        """Positions of the turns that the model is to write."""
        return tuple(i for i, message in enumerate(self.messages) if message.role == "assistant")
