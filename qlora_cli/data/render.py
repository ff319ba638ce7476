"""Messages to text, as the tokenizer's chat template says.

Knows Jinja and transformers; nothing of ids. Invariant: the text is the one that the tokenizer's `apply_chat_template`
makes, whichever way it was made, and whatever a template raises is the row's mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.runtime import new_context
from transformers.utils import chat_template_utils

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import RowError

Tools = Sequence[Mapping[str, Any]]
RAISED = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a template's own expressions raise."""


class Renderer:
    """A tokenizer's chat template, compiled once in the sandbox that transformers gives it.

    Its `apply_chat_template` converts every value of every message first; messages of a role and a content have
    nothing to convert, so they go to the compiled template directly. All others take the long way. The context is made
    here, since `Template.render` makes it from a chain of mappings, which takes as long as the rendering.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._words = dict(tokenizer.special_tokens_map)
        self._compiled: Any = None
        if isinstance(tokenizer.chat_template, str):
            try:
                self._compiled = chat_template_utils._compile_jinja_template(tokenizer.chat_template)
                self._globals = dict(self._compiled.globals)
            except (TemplateError, AttributeError, ImportError):  # the long way says what is wrong, or does without
                self._compiled = None

    def __call__(self, messages: Sequence[Message], generation: bool, tools: Tools = ()) -> str:
        """The messages as text, with what prompts the model for its turn if `generation`. Raises `RowError`."""
        try:
            if self._compiled is None or tools or any(message.extra for message in messages):
                return self._by_transformers(messages, generation, tools)
            turns = [{"role": message.role, "content": message.content} for message in messages]
            names = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": generation}
            made, words = self._compiled, names | self._words
            context = new_context(made.environment, made.name, made.blocks, words, globals=self._globals)
            return "".join(made.root_render_func(context))
        except RAISED as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def _by_transformers(self, messages: Sequence[Message], generation: bool, tools: Tools) -> str:
        turns = [message.as_dict() for message in messages]
        told = [dict(tool) for tool in tools] or None
        return self._tokenizer.apply_chat_template(turns, tools=told, tokenize=False, add_generation_prompt=generation)
