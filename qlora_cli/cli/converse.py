"""The ways to talk: at a terminal, a turn per line of stdin, one prompt, or a file of prompts.

Knows a talk and the console. Invariant: without a terminal, stdout holds one answer per prompt in their order, and an
answer that was cut short is said.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_cli.cli.console import Console
from qlora_cli.cli.repl import Repl
from qlora_cli.cli.settings import SETTINGS, without_effect
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from qlora_cli.workflows.chat import Decoding, Prompt, Talk


def decoding_of(talk: Talk, console: Console, given: dict[str, Any]) -> Decoding:
    """What the model's generation config asks for, with what is given instead."""
    from qlora_cli.workflows.events import Notice

    decoding = replace(_checked(talk.voices.defaults(), given), **given)
    if idle := without_effect(given, decoding.temperature):
        console(Notice(idle))
    return decoding


def _checked(decoding: Decoding, given: Container[str]) -> Decoding:
    """What of the model's own is not replaced by what is `given` must be in range."""
    wrong = {n: getattr(decoding, n) for n, setting in SETTINGS.items() if not setting.holds(getattr(decoding, n))}
    told = [f"{name} is {value!r}, not {SETTINGS[name].range()}" for name, value in wrong.items() if name not in given]
    if told:
        raise ModelError(
            f"the model's generation_config.json: {'; '.join(told)}",
            fix=f"correct it there, or give {', '.join(f'--{n}'.replace('_', '-') for n in wrong if n not in given)}",
        )
    return decoding


def converse(talk: Talk, console: Console, decoding: Decoding, prompt: str | None) -> None:
    """Answers `prompt` (all of stdin for `-`), else what is typed or piped in."""
    if prompt is not None:
        answer_turns(talk, console, decoding, [console.everything() if prompt == "-" else prompt])
    elif console.typed:
        Repl(talk, console, decoding).run()
    else:
        answer_turns(talk, console, decoding, console.turns())


def answer_turns(talk: Talk, console: Console, decoding: Decoding, turns: Iterable[str]) -> None:
    """Answers the turns of one conversation, each as soon as it is there."""
    from qlora_cli.workflows.events import Notice

    for turn in turns:
        console.answer(talk.say(turn, decoding), lambda: talk.last)
        if talk.last is not None and not talk.last.stopped:
            console(Notice(talk.last.limit_line()))


def answer_prompts(
    talk: Talk, console: Console, decoding: Decoding, prompts: Sequence[Prompt], batch_size: int
) -> None:
    """Answers many prompts, a JSON row for each."""
    from qlora_cli.workflows.events import Notice

    short = 0
    for answer in talk.answers(prompts, decoding, batch_size):
        short += not answer.stopped
        console.result(json.dumps(answer.row(), ensure_ascii=False), answer.as_json())
    if short:
        limit = f"max_new_tokens is {decoding.max_new_tokens:,}"
        console(Notice(f"{short:,} of {len(prompts):,} answers were cut short at their limit ({limit})"))
