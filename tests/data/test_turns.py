"""Templates and plain text: prompts are beginnings of what was trained on, and every turn ends in a stop token."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.conversation import Message
from qlora_cli.data.formats import RowError
from qlora_cli.data.turns import ALPACA_TEMPLATE, ChatTurns, PlainTurns, turn_encoder
from qlora_cli.errors import DataError
from tests.conftest import TEMPLATE, make_tokenizer
from tests.data.conftest import ALTERNATING, THINKING, talk, through, with_bos

ENDLESS = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def tokens(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("template", [TEMPLATE, THINKING, ALTERNATING, ALPACA_TEMPLATE])
def test_what_is_trained_on_begins_with_what_the_model_is_prompted_with(template: str) -> None:
    turns = turn_encoder(make_tokenizer(template), "tokenizer", "messages")
    messages = talk("u: q", "a: x</think>a", "u: r", "a: b").messages
    for count in (2, 4):
        prompt, whole = turns.prompt(messages[: count - 1]), through(turns, messages[:count])
        assert prompt == whole[: len(prompt)]
        assert whole[-1] in turns.stop_ids


def test_plain_turns_are_contents_with_bos_before_the_first_and_eos_after_each_answer() -> None:
    tokenizer = with_bos(None)
    turns = turn_encoder(tokenizer, "auto", "prompt-completion")
    messages = talk("u: q", "a: a", "u: r", "a: b").messages
    assert tokens(tokenizer, turns.prompt(())) == "<s>"
    assert tokens(tokenizer, turns.prompt(messages[:1])) == "<s> q"
    assert tokens(tokenizer, through(turns, messages[:2])) == "<s> q a </s>"
    assert tokens(tokenizer, turns.prompt(messages[:3])) == "<s> q a </s> r"
    assert turns.stop_ids == {2}


def test_plain_turns_of_a_tokenizer_without_the_habit_have_no_bos(tokenizer: Any) -> None:
    turns = PlainTurns(tokenizer)
    assert tokens(tokenizer, through(turns, talk("u: q", "a: a").messages)) == "q a </s>"


def test_plain_turns_need_an_end_of_sequence_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        PlainTurns(tokenizer)


def test_chat_turns_need_a_template() -> None:
    with pytest.raises(DataError, match="no chat template"):
        ChatTurns(make_tokenizer(None))


def test_a_template_that_ends_a_turn_without_a_special_token_is_refused() -> None:
    with pytest.raises(DataError, match="ends an assistant turn without a special token"):
        ChatTurns(make_tokenizer(ENDLESS))


REFUSING = [
    ("{{ raise_exception('no talk') }}", "refuses this conversation: no talk"),
    ("{% for m in messages %}{{ m.role + 1 }}{% endfor %}", "refuses this conversation: can only concatenate"),
    ("{% if", "refuses this conversation: unexpected 'end of template'"),
    (
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
        "renders the prompt otherwise once the answer is there",
    ),
]


@pytest.mark.parametrize(("template", "reason"), REFUSING)
def test_a_template_that_cannot_render_a_question_and_its_answer_is_refused(template: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        ChatTurns(make_tokenizer(template))
    problem = caught.value.problems[0]
    assert problem.what.startswith("a question and its answer cannot be rendered")
    assert reason in problem.what
    assert "data.template" in problem.fix


def test_a_conversation_that_the_template_refuses_is_the_rows_mistake() -> None:
    turns = ChatTurns(make_tokenizer(ALTERNATING))
    with pytest.raises(RowError, match="refuses this conversation: roles must alternate user/assistant"):
        through(turns, talk("s: s", "u: q", "a: a").messages)


def test_a_turn_that_the_template_leaves_open_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.content != 'x' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    turns = ChatTurns(
        make_tokenizer(template.replace("{{ m.content }}", "{% if loop.index0 %}:{% endif %}{{ m.content }}"))
    )
    with pytest.raises(RowError, match="did not end this assistant turn"):
        through(turns, talk("u: q", "a: x").messages)


def test_a_turn_ends_with_the_templates_own_token_as_well_as_with_eos() -> None:
    template = "{% for m in messages %}{{ m.content }}<|user|>{% endfor %}"
    tokenizer = make_tokenizer(template)
    turns = ChatTurns(tokenizer)
    assert turns.stop_ids == {tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id}
    assert tokens(tokenizer, through(turns, talk("u: q", "a: a").messages)) == "q <|user|> a <|user|>"


def test_what_a_template_puts_after_the_end_of_turn_is_left_off(tokenizer: Any) -> None:
    turns = ChatTurns(tokenizer)
    assert TEMPLATE.count("</s>\n") == 1
    assert tokens(tokenizer, through(turns, talk("u: q", "a: a").messages)).endswith("Ċ a </s>")


RESOLVED = [
    ("auto", "messages", True, ChatTurns, TEMPLATE),
    ("auto", "alpaca", True, ChatTurns, TEMPLATE),
    ("auto", "alpaca", False, ChatTurns, ALPACA_TEMPLATE),
    ("auto", "prompt-completion", True, PlainTurns, TEMPLATE),
    ("auto", "text", True, PlainTurns, TEMPLATE),
    ("alpaca", "messages", True, ChatTurns, ALPACA_TEMPLATE),
    ("tokenizer", "prompt-completion", True, ChatTurns, TEMPLATE),
    ("none", "messages", True, PlainTurns, TEMPLATE),
]


@pytest.mark.parametrize(("wanted", "row_format", "has_template", "kind", "template"), RESOLVED)
def test_the_recipe_and_the_format_choose_the_template(
    wanted: str, row_format: str, has_template: bool, kind: type, template: str
) -> None:
    tokenizer = make_tokenizer(TEMPLATE if has_template else None)
    assert type(turn_encoder(tokenizer, wanted, row_format)) is kind
    assert tokenizer.chat_template == template


def test_a_system_message_leads_the_alpaca_template() -> None:
    tokenizer = make_tokenizer(ALPACA_TEMPLATE)
    turns = ChatTurns(tokenizer)
    ids = turns.prompt((Message("system", "s"), Message("user", "q")))
    assert tokenizer.decode(ids) == "<s>s\n\n### Instruction:\nq\n\n### Response:\n"


def test_an_end_of_turn_before_an_eos_behind_the_whole_conversation_ends_the_turn() -> None:
    """Phi-3's shape: each turn ends in its own token, and the whole text in EOS."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|user|>{% endfor %}"
        "{% if add_generation_prompt %}a:{% else %}</s>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    turns = ChatTurns(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    assert turns.stop_ids == {end, 2}
    talk = [Message("user", "q"), Message("assistant", "x"), Message("user", "r"), Message("assistant", "y")]
    first, second = through(turns, talk[:2]), through(turns, talk)
    assert first[-1] == second[-1] == end
    assert second[: len(first)] == first
