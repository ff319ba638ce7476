"""Chat templates by name, and which one a recipe means.

Knows Jinja and a tokenizer's vocabulary; nothing of rows, ids or loss. Invariant: the template that is chosen stands in
the tokenizer afterwards, and so do the tokens it needs, so that both are saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from qlora_cli.errors import DataError

_HEAD = (
    "{% if tools %}{{ raise_exception('this template knows no tools; chatml and llama3 do') }}{% endif %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if 'tool_calls' in message or message['role'] == 'tool' %}"
    "{{ raise_exception('this template knows no tool calls; chatml and llama3 do') }}"
)
"""Where a template without tools begins: refusals, BOS, the loop over the messages and the start of its conditions."""

_ALPACA = _HEAD + (
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

_GUANACO = _HEAD + (
    "{% elif message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'user' %}### Human: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)

_VICUNA = _HEAD + (
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_ZEPHYR = _HEAD + (
    "{% else %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_CALL = r"""{{- called['name'] ~ '", "KEY": ' }}
            {{- called['arguments'] if called['arguments'] is string else called['arguments'] | tojson }}"""

_CHATML = r"""
{%- set led = messages[0]['role'] == 'system' %}
{%- set said = messages[0]['content'] if led else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (said ~ '\n\n' if said else '') ~ '# Tools\n\n' }}
    {{- 'You may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif led %}
    {{- '<|im_start|>system\n' ~ said ~ '<|im_end|>\n' }}
{%- endif %}
{%- for message in (messages[1:] if led else messages) %}
    {%- if message['role'] == 'tool' %}
        {{- '' if loop.previtem and loop.previtem['role'] == 'tool' else '<|im_start|>user' }}
        {{- '\n<tool_response>\n' ~ message['content'] ~ '\n</tool_response>' }}
        {{- '' if loop.nextitem and loop.nextitem['role'] == 'tool' else '<|im_end|>\n' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set called = call['function'] if 'function' in call else call %}
            {{- ('\n' if message['content'] or not loop.first else '') ~ '<tool_call>\n{"name": "' }}
            CALL
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".replace("CALL", _CALL.replace("KEY", "arguments"))

_LLAMA3 = r"""
{{- bos_token }}
{%- set led = messages[0]['role'] == 'system' %}
{%- if tools or led %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' ~ ('Environment: ipython\n' if tools else '') }}
    {{- (messages[0]['content'] if led else '') ~ '<|eot_id|>' }}
{%- endif %}
{%- if tools %}{%- set told = namespace(done=false) %}{%- endif %}
{%- for message in (messages[1:] if led else messages) %}
    {%- if message['role'] == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ (message['content'] | tojson) ~ '<|eot_id|>' }}
    {%- elif 'tool_calls' in message and message['tool_calls'] %}
        {%- if message['tool_calls'] | length != 1 or message['content'] %}
            {{- raise_exception('the llama3 template knows one tool call to a turn, and no text beside it') }}
        {%- endif %}
        {%- set call = message['tool_calls'][0] %}
        {%- set called = call['function'] if 'function' in call else call %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' }}
            CALL
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}
        {%- if tools and message['role'] == 'user' and not told.done %}
            {%- set told.done = true %}
            {{- 'Given the following functions, please respond with a JSON for a function call ' }}
            {{- 'with its proper arguments that best answers the given prompt.\n\n' }}
            {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its ' }}
            {{- 'value}. Do not use variables.\n\n' }}
            {%- for tool in tools %}{{- (tool | tojson(indent=4)) ~ '\n\n' }}{%- endfor %}
        {%- endif %}
        {{- message['content'] ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
""".replace("CALL", _CALL.replace("KEY", "parameters"))

TEMPLATES: Mapping[str, str] = {
    "chatml": _CHATML.strip(),
    "llama3": _LLAMA3.strip(),
    "alpaca": _ALPACA,
    "guanaco": _GUANACO,
    "vicuna": _VICUNA,
    "zephyr": _ZEPHYR,
}
_SPECIAL: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_CONVERSATIONS = ("auto", "messages", "sharegpt", "oasst", "guanaco", "chip2", "hh-rlhf")
TEXTS = ("text", "prompt-completion", "self-instruct", "longform", "unnatural-instructions")
"""Formats whose rows are no conversations: plain text, if the recipe does not say otherwise."""


@dataclass(frozen=True)
class Chosen:
    """A template by its name (`tokenizer`: its own; `recipe`: the recipe's Jinja; `none`: plain text), and the tokens
    that the vocabulary gained for it, in the order of their ids."""

    name: str
    added: tuple[str, ...] = ()


def special_tokens(name: str) -> tuple[str, ...]:
    """The tokens that a named template needs in the vocabulary."""
    return _SPECIAL.get(name, ())


def apply_template(tokenizer: Any, template: str, row_format: str, new_tokens: Sequence[str] = ()) -> Chosen:
    """Sets the template that `data.template` asks for on the tokenizer and adds the tokens that are missing. Doing it
    again changes nothing. Raises `DataError` where there is no template to use, or where the recipe's is no Jinja."""
    name = _resolve(tokenizer, template, row_format)
    if name == "recipe":
        tokenizer.chat_template = _checked(tokenizer, template)
    elif name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
    elif name == "tokenizer" and not tokenizer.chat_template:
        raise no_template(tokenizer)
    return Chosen(name, _add(tokenizer, (*special_tokens(name), *new_tokens)))


def _resolve(tokenizer: Any, template: str, row_format: str) -> str:
    if template == "recipe":  # as an earlier call chose: it is the tokenizer's by now
        return "tokenizer"
    if template != "auto":
        return "recipe" if "{{" in template or "{%" in template else template
    if row_format == "alpaca":
        return "tokenizer" if tokenizer.chat_template else "alpaca"
    assert row_format in _CONVERSATIONS + TEXTS, f"{row_format} is no format of rows"
    return "tokenizer" if row_format in _CONVERSATIONS else "none"


def no_template(tokenizer: Any) -> DataError:
    """What to say where conversations are to become text and nothing says how: which template the vocabulary is for."""
    vocabulary = tokenizer.get_vocab()
    fitting = [name for name, tokens in _SPECIAL.items() if tokens[0] in vocabulary]
    free = "`alpaca`, `guanaco` and `vicuna` need no new token; `chatml` adds two and trains their embeddings"
    return DataError(
        "the base model's tokenizer has no chat template",
        why="conversations need one to become text",
        fix=f"set data.template: {fitting[0]} (the vocabulary has its {_SPECIAL[fitting[0]][0]})"
        if fitting
        else f"set data.template: {free}; or take the instruction-tuned variant as model.base",
    )


def _checked(tokenizer: Any, template: str) -> str:
    """The recipe's own template, if it is Jinja. What it makes of a conversation is seen when one is rendered."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise DataError(
            f"data.template, line {error.lineno}: {error.message}",
            why="the recipe's template is not valid Jinja",
            fix="mend it, or name a template that comes with this program (see docs/data.md)",
        ) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        pass  # it parses; a question without an answer may be refused
    return template


def _add(tokenizer: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """Makes each a special token of the vocabulary, beside those it has; those that had no id before."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [token for token in dict.fromkeys(wanted) if token not in special]
    if not missing:
        return ()
    before = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tuple(token for token in missing if token not in before)
