"""A conversation: what was said, and what is said next.

Sees who speaks (`voices.py`) and keeps the history. Invariant: the history is turns of user and assistant in
alternation, and a turn that failed leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.conversation import Message
from qlora_cli.data.sources import raise_all
from qlora_cli.errors import DataError, DeviceMemoryError, Problem
from qlora_cli.generation.decoder import Finish
from qlora_cli.generation.sampling import Decoding
from qlora_cli.training.guard import memory_guard
from qlora_cli.workflows.prompts import Prompt, append_row, as_rows
from qlora_cli.workflows.voice import Ended, Voice, how_ended
from qlora_cli.workflows.voices import Voices

SEEDS = 2**32
Pieces = Generator[str, None, None]


@dataclass(frozen=True)
class Answer:
    """What was said, and how it came about."""

    asked: tuple[Message, ...]
    text: str
    ended: Ended
    finish: Finish

    @property
    def stopped(self) -> bool:
        """Whether the model ended it, by a stop token."""
        return self.ended == "stop token"

    def line(self) -> str:
        """Its figures."""
        f = self.finish
        speed = f", {f.tokens / f.seconds:,.1f} tokens/s, first after {f.first_seconds:.2f} s" if f.seconds else ""
        reused = f"{f.reused_tokens:,} of {f.prompt_tokens:,} prompt tokens reused"
        return "; ".join([f"{f.tokens:,} tokens{speed}", reused, *([self.limit_line()] if not self.stopped else [])])

    def limit_line(self) -> str:
        """What cut it short."""
        count = f"{self.finish.tokens:,} tokens"
        if self.ended == "interrupted":
            return f"stopped by you after {count}"
        positions = "the model's positions are used up"
        return f"stopped at {count} ({positions if self.ended == 'positions' else self.ended})"

    def row(self) -> dict[str, Any]:
        """`prompt` for a single turn, else `messages`; the answer, and whether it is whole."""
        single = len(self.asked) == 1 and self.asked[0].role == "user"
        asked = {"prompt": self.asked[0].content} if single else {"messages": as_rows(self.asked)}
        return {**asked, "answer": self.text, "stopped": self.stopped}

    def as_json(self) -> dict[str, Any]:
        """See `Event`."""
        return {"event": "answer", **self.row(), "tokens": self.finish.tokens, "ended": self.ended}


def instructed(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The messages behind the system message, unless there is none or they bring their own."""
    own = system is None or (messages and messages[0].role == "system")
    return messages if own else (Message("system", str(system)), *messages)


def encode(voice: Voice, room: Callable[[int], int], where: str, messages: Sequence[Message]) -> list[int] | Problem:
    """The tokens of a prompt that stands at `where`, or why it cannot be answered."""
    try:
        ids = voice.prompt(messages)
        room(len(ids))
    except DataError as error:
        return replace(error.problems[0], where=where)
    return ids


class Talk:
    """A conversation with a loaded model."""

    def __init__(self, voices: Voices) -> None:
        self.voices = voices
        self.system: str | None = None
        self.last: Answer | None = None
        self._turns: list[Answer] = []
        self._draws = 0

    @property
    def history(self) -> tuple[Message, ...]:
        """The turns so far, behind the system message if there is one."""
        said = [(turn.asked[-1], Message("assistant", turn.text)) for turn in self._turns]
        return instructed(tuple(message for pair in said for message in pair), self.system)

    def instruct(self, text: str | None) -> None:
        """Sets the system message of this conversation, or takes it away. `DataError` where the template has no place
        for one."""
        probe = (Message("user", "a"),)
        prompt = self.voices.voice.prompt
        if text is not None and prompt((Message("system", text), *probe)) == prompt(probe):
            raise DataError("the chat template leaves system messages out", fix="say it in the first turn")
        self.system = text

    def say(self, text: str, decoding: Decoding) -> Pieces:
        """Pieces of the answer to the next turn. Stopped by its reader or by Ctrl-C, what was said stays, as a short
        answer; where nothing was said, the turn is taken back."""
        return self._answer((*self.history, Message("user", text)), decoding, replaces=0)

    def retry(self, decoding: Decoding) -> Pieces:
        """Pieces of another answer to the last turn, which takes the place of the one before."""
        return self._answer(self._last_asked("answer again"), decoding, replaces=1)

    def _answer(self, asked: tuple[Message, ...], decoding: Decoding, replaces: int) -> Pieces:
        """The n-th answer of a conversation is drawn with seed + n: a second try is not the first one again."""
        seeded = replace(decoding, seed=(decoding.seed + self._draws) % SEEDS)
        self.last, pieces = None, list[str]()
        try:
            with _memory():
                for piece in self.voices.stream(asked, seeded):
                    pieces.append(piece)
                    yield piece
        except (KeyboardInterrupt, GeneratorExit):
            if pieces:
                self._keep(Answer(asked, "".join(pieces), "interrupted", self.voices.finish), replaces)
            raise
        finish = self.voices.finish
        ended = how_ended(finish.stopped, finish.tokens, decoding)
        self._keep(Answer(asked, "".join(pieces), ended, finish), replaces)

    def _keep(self, answer: Answer, replaces: int) -> None:
        self.last = answer
        self._draws += 1
        self._turns[len(self._turns) - replaces :] = [answer]

    def undo(self) -> str:
        """Takes the last turn and its answer back; returns what was asked."""
        self._last_asked("take back")
        return self._turns.pop().asked[-1].content

    def reset(self) -> None:
        """Begins a new conversation; the system message stays."""
        self._turns, self._draws, self.last = [], 0, None

    def _last_asked(self, doing: str) -> tuple[Message, ...]:
        if not self._turns:
            raise DataError(f"there is nothing to {doing} yet")
        return self.history[:-1]

    def compare(self, decoding: Decoding) -> Iterator[tuple[str | None, Answer]]:
        """(who, what) the base and every adapter answer to the last turn. Neither history nor voice changes."""
        asked = self._last_asked("compare")
        with self.voices.returning():
            for name in (None, *self.voices.names):
                self.voices.use(name)
                with _memory():
                    text = "".join(self.voices.stream(asked, decoding))
                finish = self.voices.finish
                yield name, Answer(asked, text, how_ended(finish.stopped, finish.tokens, decoding), finish)

    def save(self, path: Path) -> str:
        """Appends the conversation to a .jsonl file, as a row that training reads; says what it did."""
        empty = [number for number, turn in enumerate(self._turns, start=1) if not turn.text.strip()]
        if not self._turns or empty:
            what = f"answer {empty[0]} is empty" if empty else "nothing was said yet"
            raise DataError(f"not saved: {what}, and training takes no such row", fix="/retry, or /undo" * bool(empty))
        existed = append_row(path, {"messages": as_rows(self.history)})
        short = sum(not turn.stopped for turn in self._turns)
        note = f"; {short} of its answers were cut short, and training would teach to end there" if short else ""
        return f"{'appended to' if existed else 'written to new'} {path}: {len(self.history)} messages{note}"

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding, batch_size: int) -> Iterator[Answer]:
        """Answers to many prompts in their order, each a conversation of its own. All that are too long are named
        before the first is answered."""
        asked = [instructed(prompt.messages, self.system) for prompt in prompts]
        voice, space = self.voices.voice, self.voices.room
        outcomes = [encode(voice, space, prompt.where, each) for prompt, each in zip(prompts, asked, strict=True)]
        raise_all([outcome for outcome in outcomes if isinstance(outcome, Problem)])
        encoded = [outcome for outcome in outcomes if not isinstance(outcome, Problem)]
        with _memory():
            completions = self.voices.complete(encoded, decoding, batch_size)
            for messages, ids, completion in zip(asked, encoded, completions, strict=True):
                finish = Finish(completion.stopped, len(completion.ids), len(ids))
                ended = how_ended(completion.stopped, len(completion.ids), decoding)
                yield Answer(messages, self.voices.voice.answer(completion.ids), ended, finish)

    def answer_all(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to many prompts, each a conversation of its own."""
        rows = [Prompt((Message("user", text),)) for text in prompts]
        return [answer.text for answer in self.answers(rows, Decoding(max_new_tokens), 32)]


@contextmanager
def _memory() -> Iterator[None]:
    try:
        with memory_guard("answering"):
            yield
    except DeviceMemoryError as error:
        fix = "shorten the conversation, or lower --batch-size or --max-new-tokens"
        raise DeviceMemoryError(error.problems[0].what, fix=fix) from error
