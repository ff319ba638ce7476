"""Templates by name: what they write, what they need, and which one a recipe gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.encode import encode
from qlora_cli.data.formats import RowError
from qlora_cli.data.templates import TEMPLATES, Chosen, apply_template, special_tokens
from qlora_cli.data.turns import ChatTurns, turn_encoder
from qlora_cli.data.verify import verify
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DataSection
from tests.conftest import TEMPLATE, make_tokenizer
from tests.data.conftest import talk, with_bos

NAMES = list(TEMPLATES)
TALK = talk("s: S", "u: q", "a: a", "u: r", "a: b")
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    ),
    "alpaca": ("<s>S\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n### Instruction:\nr\n\n### Response:\nb</s>"),
    "guanaco": "<s>S\n### Human: q\n### Assistant: a</s>\n### Human: r\n### Assistant: b</s>",
    "vicuna": "<s>S USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
    "zephyr": "<s><|system|>\nS</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\nb</s>",
}
LEARNED = {
    "chatml": "a<|im_end|>b<|im_end|>",
    "llama3": "a<|eot_id|>b<|eot_id|>",
    "alpaca": "a</s>b</s>",
    "guanaco": " a</s> b</s>",
    "vicuna": " a</s> b</s>",
    "zephyr": "a</s>b</s>",
}


def test_the_schema_names_the_templates_that_there_are() -> None:
    annotation = DataSection.model_fields["template"].annotation
    words = {word for part in get_args(annotation) for word in get_args(part) if isinstance(word, str)}
    assert set(NAMES) == words - {"auto", "tokenizer", "none"}


@pytest.mark.parametrize("name", NAMES)
def test_a_named_template_writes_its_familys_text_and_teaches_the_answers_and_their_end(name: str) -> None:
    tokenizer = make_tokenizer(None)
    turns = turn_encoder(tokenizer, name, "messages")
    (row,) = encode(TALK, turns, "assistant")
    assert tokenizer.decode(row.ids) == WRITTEN[name]
    assert tokenizer.decode(row.ids[row.loss]) == LEARNED[name]
    assert row.ids[-1] in turns.stop_ids
    assert tokenizer.eos_token_id in turns.stop_ids
    assert verify(turns, [TALK, talk("u: q", "a: a")]) == ()


@pytest.mark.parametrize("name", NAMES)
def test_bos_is_written_once_by_a_tokenizer_with_the_habit(name: str) -> None:
    turns = turn_encoder(with_bos(None), name, "messages")
    assert turns.prompt(TALK.messages[:2]).count(1) == (0 if name == "chatml" else 1)


ADDED = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


@pytest.mark.parametrize("name", NAMES)
def test_missing_tokens_are_added_beside_those_there_are_and_only_once(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    before = tokenizer.get_vocab()
    wanted = ADDED.get(name, ())
    assert special_tokens(name) == wanted
    assert apply_template(tokenizer, name, "messages") == Chosen(name, wanted)
    assert tokenizer.get_vocab() == before | {token: len(before) + i for i, token in enumerate(wanted)}
    for token in ("<|user|>", *wanted):
        assert tokenizer(token).input_ids == tokenizer.convert_tokens_to_ids([token])
        assert tokenizer.decode(tokenizer(token).input_ids, skip_special_tokens=True) == ""
    assert apply_template(tokenizer, name, "messages") == Chosen(name)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.chat_template, again.get_vocab()) == (TEMPLATES[name], tokenizer.get_vocab())
    assert apply_template(again, name, "messages") == Chosen(name)


def test_new_tokens_of_the_recipe_are_added_whatever_the_template() -> None:
    tokenizer = make_tokenizer()
    assert apply_template(tokenizer, "none", "text", ("<call>", "<|user|>", "<call>")) == Chosen("none", ("<call>",))
    assert tokenizer("<call>").input_ids == [261]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = Conversation(
    (
        Message("user", "q"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "7"),
        Message("assistant", "a"),
    ),
    (TOOL,),
)
TOLD = {
    "chatml": '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n</tools>',
    "llama3": 'Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": "add",',
}
CALLED = {
    "chatml": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>a<|im_end|>',
    "llama3": '{"name": "add", "parameters": {"x": 1}}<|eot_id|>a<|eot_id|>',
}


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_tools_are_learned_or_refused(name: str) -> None:
    tokenizer = make_tokenizer(None)
    turns = turn_encoder(tokenizer, name, "messages")
    if name not in CALLED:
        with pytest.raises(RowError, match="this template knows no tools"):
            encode(CALLING, turns, "assistant")
        with pytest.raises(RowError, match="this template knows no tool calls"):
            encode(Conversation(CALLING.messages), turns, "assistant")
        return
    (row,) = encode(CALLING, turns, "assistant")
    assert TOLD[name] in tokenizer.decode(row.ids)
    assert tokenizer.decode(row.ids[row.loss]) == CALLED[name]


def test_chatml_gathers_what_several_tools_said_in_one_turn() -> None:
    tokenizer = make_tokenizer(None)
    turns = turn_encoder(tokenizer, "chatml", "messages")
    text = tokenizer.decode(turns.prompt((Message("user", "q"), Message("tool", "7"), Message("tool", "8"))))
    assert text == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_arguments_that_are_json_already_are_written_as_they_are() -> None:
    tokenizer = make_tokenizer(None)
    turns = turn_encoder(tokenizer, "chatml", "messages")
    call = {"function": {"name": "f", "arguments": '{"x":1}'}}
    _, answer = turns.turn((Message("user", "q"), Message("assistant", "t", extra={"tool_calls": [call, call]})))
    one = '\n<tool_call>\n{"name": "f", "arguments": {"x":1}}\n</tool_call>'
    assert tokenizer.decode(answer) == f"t{one}{one}<|im_end|>"


@pytest.mark.parametrize("row_format", ["messages", "sharegpt", "oasst", "guanaco", "chip2", "hh-rlhf"])
def test_conversations_get_the_tokenizers_own_template(row_format: str) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    assert apply_template(tokenizer, "auto", row_format) == Chosen("tokenizer")
    assert tokenizer.chat_template == TEMPLATE


TEXTS = ["text", "prompt-completion", "self-instruct", "longform", "unnatural-instructions"]


@pytest.mark.parametrize("row_format", TEXTS)
def test_texts_and_their_continuations_get_none(row_format: str) -> None:
    assert apply_template(make_tokenizer(TEMPLATE), "auto", row_format) == Chosen("none")


def test_every_format_but_auto_has_an_automatic_template() -> None:
    annotation = DataSection.model_fields["format"].annotation
    formats = [word for word in get_args(annotation) if word != "auto"]
    assert len(formats) > 10
    assert {apply_template(make_tokenizer(), "auto", name).name for name in formats} == {"tokenizer", "none"}


WITHOUT = [
    ((), "`alpaca`, `guanaco` and `vicuna` need no new token; `chatml` adds two and trains their embeddings"),
    (("<|im_start|>", "<|im_end|>"), "data.template: chatml (the vocabulary has its <|im_start|>)"),
    (("<|start_header_id|>",), "data.template: llama3 (the vocabulary has its <|start_header_id|>)"),
]


@pytest.mark.parametrize("template", ["auto", "tokenizer"])
@pytest.mark.parametrize(("tokens", "advice"), WITHOUT)
def test_a_base_without_a_template_is_told_which_one_its_vocabulary_is_for(
    template: str, tokens: tuple[str, ...], advice: str
) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens(list(tokens))
    with pytest.raises(DataError, match="has no chat template") as caught:
        apply_template(tokenizer, template, "messages")
    assert advice in caught.value.problems[0].fix


def test_the_recipes_own_jinja_is_used_as_it_is_and_stays_when_it_is_named_again() -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    own = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert apply_template(tokenizer, own, "messages") == Chosen("recipe")
    assert tokenizer.chat_template == own
    assert isinstance(turn_encoder(tokenizer, "recipe", "messages"), ChatTurns)
    assert tokenizer.chat_template == own


def test_jinja_that_does_not_parse_is_named_with_its_line() -> None:
    with pytest.raises(DataError, match=r"data.template, line 2: Encountered unknown tag 'fro'"):
        apply_template(make_tokenizer(), "{{ bos_token }}\n{% fro m in messages %}", "messages")


def test_a_template_in_the_recipe_cannot_leave_its_sandbox() -> None:
    with pytest.raises(DataError, match="a question and its answer cannot be rendered"):
        turn_encoder(make_tokenizer(), "{{ messages.__class__.__mro__[1].__subclasses__() }}", "messages")


MARKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}START{% generation %}{{ m.content }}END"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AGREEING = [
    ("", "</s>{% endgeneration %}"),
    ("", "{% endgeneration %}</s>"),
    ("", "</s>\n{% endgeneration %}"),
]


@pytest.mark.parametrize(("start", "end"), AGREEING)
def test_marks_may_end_before_or_after_the_end_of_turn(start: str, end: str) -> None:
    turns = ChatTurns(make_tokenizer(MARKS.replace("START", start).replace("END", end)))
    assert verify(turns, [talk("u: q", "a: ab", "u: r", "a: c")]) == ()


def test_marks_that_leave_out_what_the_model_has_to_say_are_refused() -> None:
    template = MARKS.replace(
        "START{% generation %}{{ m.content }}END", "{{ m.content }}{% generation %}</s>{% endgeneration %}"
    )
    with pytest.raises(DataError, match=r"marks leave out tokens 4 and on of a row: a b\n"):
        verify(ChatTurns(make_tokenizer(template)), [talk("u: q", "a: ab")])


def test_marks_that_cover_more_than_answers_are_refused() -> None:
    template = MARKS.replace("<|{{ m.role }}|>{% if", "{% if").replace(
        "START{% generation %}", "{% generation %}<|assistant|>"
    )
    template = template.replace("END", "</s>{% endgeneration %}")
    with pytest.raises(DataError, match=r"marks cover tokens 2 and on of a row: <\|assistant\|>\n"):
        verify(ChatTurns(make_tokenizer(template)), [talk("u: q", "a: ab")])


FAILING: list[tuple[str, str, tuple[str, ...]]] = [
    ("begins with two BOS", TEMPLATE.replace("<s>", "<s>{{ bos_token }}"), ("u: q", "a: a")),
]


@pytest.mark.parametrize(("what", "template", "turns"), FAILING)
def test_a_template_that_does_not_hold_on_the_first_rows_is_refused(
    what: str, template: str, turns: tuple[str, ...]
) -> None:
    encoder = ChatTurns(make_tokenizer(template))
    with pytest.raises(DataError, match=what):
        verify(encoder, [talk(*turns)])


def test_that_a_template_rewrites_history_is_said() -> None:
    from tests.data.conftest import THINKING

    notes = verify(ChatTurns(make_tokenizer(THINKING)), [talk("u: q", "a: x</think>a", "u: r", "a: b")])
    assert len(notes) == 1
    assert "rewrites earlier turns" in notes[0]


class Endless:
    """An encoder whose answers never end: what `verify` is there to find."""

    stop_ids: frozenset[int] = frozenset({2})
    bos_id: int | None = None
    lead: str = ""

    def prompt(self, messages: Any, tools: Any = ()) -> list[int]:
        """The same for all."""
        return [5]

    def turn(self, messages: Any, tools: Any = ()) -> tuple[list[int], list[int]]:
        """An answer without an end."""
        return [5], [6, 7]

    def rows(self, conversations: Any) -> list[Any]:
        """None at once."""
        return [None for _ in conversations]


def test_an_answer_without_an_end_is_found() -> None:
    with pytest.raises(DataError, match="does not end in an end-of-turn token"):
        verify(Endless(), [talk("u: q", "a: a")])
