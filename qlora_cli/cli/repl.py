"""A conversation at a terminal: turns, and commands that begin with a slash.

Knows a talk and the console. Invariant: no mistake, failed turn or Ctrl-C ends the session; Ctrl-D and /exit do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qlora_cli.cli import signals
from qlora_cli.cli.console import Console, StdoutError
from qlora_cli.cli.history import History, history_file
from qlora_cli.cli.settings import SETTINGS, nearest, parse_setting, without_effect

if TYPE_CHECKING:
    from qlora_cli.workflows.chat import Decoding, Talk

BASE = "base"
"""See `workflows/chat.py`."""


@dataclass(frozen=True)
class Command:
    """What a slash command takes, does, and says of itself in /help."""

    run: Callable[[Repl, str], None]
    help: str
    takes: str = ""


class Repl:
    """The session."""

    def __init__(self, talk: Talk, console: Console, decoding: Decoding) -> None:
        self._talk, self._console = talk, console
        self.decoding = decoding
        self._over = False

    def run(self) -> None:
        """Until Ctrl-D or /exit."""
        history = History(history_file())
        self._console.status("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        while not self._over:
            with contextlib.suppress(KeyboardInterrupt):  # one more, while the first is still dealt with
                signals.settle()
                line = self._console.ask(f"{self._speaker()}> ")
                if line is None:
                    return
                history.keep()
                self.take(line)

    def _speaker(self) -> str:
        names = self._talk.voices.names
        return (self._talk.voices.active or BASE) if names else ""

    def take(self, line: str) -> None:
        """One line: a command, or the next turn (a turn that begins with a slash is written with two)."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line.strip():
                self._answer(self._talk.say(line.removeprefix("/") if line.startswith("//") else line, self.decoding))
        except StdoutError:
            raise
        except typer.BadParameter as error:
            self._console.hint(f"error: {error.message}")
        except KeyboardInterrupt:
            self._console.hint("")
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Shows why a line failed; one that Ctrl-C ended within a library's native code was interrupted."""
        if signals.interruption() is None:
            self._console.problem(error)
        else:
            signals.settle()
            self._console.hint("\nstopped: the conversation is as it was")

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            slashed = [f"/{known}" for known in COMMANDS]
            raise typer.BadParameter(
                f"/{name} is no command; {nearest(f'/{name}', slashed)}; // begins a turn with a slash"
            )
        if rest.strip() and not command.takes:
            raise typer.BadParameter(f"/{name} takes nothing (got {rest.strip()})")
        command.run(self, rest.strip())

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        """Shows an answer and its figures. Whatever stops it, the generator is closed, and with it the answer kept."""
        with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
            self._console.answer(pieces)
        if self._talk.last is None:
            self._console.hint("\nstopped before anything was said: the conversation is as it was")
        else:
            self._console.status(self._talk.last.line())

    def help(self, _: str) -> None:
        """The commands."""
        width = max(len(f"/{name} {command.takes}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self._console.hint(f"{f'/{name} {command.takes}':<{width}}  {command.help}")
        self._console.hint("A line that ends in a backslash goes on in the next one; // begins a turn with a slash.")

    def reset(self, _: str) -> None:
        """A new conversation."""
        self._talk.reset()
        self._console.hint("a new conversation" + (", with the same system message" if self._talk.system else ""))

    def system(self, text: str) -> None:
        """Shows, sets or removes the system message."""
        if text:
            self._talk.instruct(None if text == "none" else text)
        self._console.hint(f"system message: {self._talk.system or 'none'}")

    def set(self, text: str) -> None:
        """Shows or changes how answers are decoded; all of a line or nothing."""
        changes: dict[str, Any] = dict(parse_setting(part) for part in text.split())
        self.decoding = replace(self.decoding, **changes)
        shown = [f"{name}={getattr(self.decoding, name):g}" for name in changes or SETTINGS]
        idle = without_effect(changes, self.decoding.temperature)
        self._console.hint("  ".join(shown) + (f"  ({idle})" if idle else ""))

    def retry(self, _: str) -> None:
        """Another answer to the last turn."""
        self._answer(self._talk.retry(self.decoding))

    def undo(self, _: str) -> None:
        """Takes the last turn back."""
        self._console.hint(f"taken back: {self._talk.undo()}")

    def save(self, path: str) -> None:
        """Appends the conversation to a file."""
        if not path:
            raise typer.BadParameter("name a file: /save FILE.jsonl")
        self._console.hint(self._talk.save(Path(path)))

    def adapter(self, name: str) -> None:
        """Lists the adapters, or lets one speak."""
        voices = self._talk.voices
        if not name:
            marks = [f"{'*' if each == voices.active else ' '} {each or BASE}" for each in (None, *voices.names)]
            self._console.hint("\n".join(marks))
        elif name not in voices.names and (first := name.split(maxsplit=1)[0]) in voices.names:
            raise typer.BadParameter(f"/adapter takes one name (got {name.removeprefix(first).strip()} behind {first})")
        elif name not in voices.names:
            known = nearest(name, voices.names) if voices.names else "none was loaded (--adapter DIR)"
            raise typer.BadParameter(f"there is no adapter {name}; {known}")
        else:
            voices.use(name)

    def base(self, _: str) -> None:
        """Lets the bare base speak."""
        self._talk.voices.use(None)

    def compare(self, _: str) -> None:
        """The last turn, answered by all."""
        answers = {}
        for name, answer in self._talk.compare(self.decoding):
            answers[name or BASE] = answer.text if answer.stopped else f"{answer.text}\n[{answer.limit_line()}]"
            self._console.status(f"{name or BASE}: {answer.line()}")
        self._console.side_by_side(answers)

    def exit(self, _: str) -> None:
        """Ends the session."""
        self._over = True


COMMANDS = {
    "help": Command(Repl.help, "This list."),
    "reset": Command(Repl.reset, "Begin a new conversation."),
    "system": Command(Repl.system, "Set the system message (none: remove it; bare: show it).", "TEXT"),
    "set": Command(Repl.set, f"Change {', '.join(SETTINGS)} (bare: show them).", "KEY=VALUE"),
    "retry": Command(Repl.retry, "Answer the last turn once more."),
    "undo": Command(Repl.undo, "Take the last turn and its answer back."),
    "save": Command(Repl.save, "Append the conversation to a .jsonl file, as a row that `qlora train` reads.", "FILE"),
    "adapter": Command(Repl.adapter, "Switch to an adapter (bare: list them).", "NAME"),
    "base": Command(Repl.base, "Switch to the base without an adapter."),
    "compare": Command(Repl.compare, "Answer the last turn with the base and every adapter; nothing is remembered."),
    "exit": Command(Repl.exit, "End; so does Ctrl-D."),
}
