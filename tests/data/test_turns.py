"""Templates and plain text: prompts are beginnings of what was trained on, and every turn ends in a stop token."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.formats import RowError
from qlora_cli.data.render import Renderer
from qlora_cli.data.templates import TEMPLATES
from qlora_cli.data.turns import ChatTurns, PlainTurns, turn_encoder
from qlora_cli.errors import DataError
from tests.conftest import TEMPLATE, make_tokenizer
from tests.data.conftest import ALTERNATING, THINKING, talk, through, with_bos

ALPACA = TEMPLATES["alpaca"]
ENDLESS = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def tokens(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("template", [TEMPLATE, THINKING, ALTERNATING, ALPACA])
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
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
        "renders the prompt otherwise once the answer is there",
    ),
    (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}",
        "opens a <think> block, but keeps no reasoning of this answer",
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
    ("auto", "alpaca", False, ChatTurns, ALPACA),
    ("auto", "prompt-completion", True, PlainTurns, TEMPLATE),
    ("auto", "text", True, PlainTurns, TEMPLATE),
    ("alpaca", "messages", True, ChatTurns, ALPACA),
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
    tokenizer = make_tokenizer(ALPACA)
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


EMPTY_BLOCK = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}"
)
OPEN_BLOCK = EMPTY_BLOCK.replace("<think>\n\n</think>\n\n", "<think>\n")


def test_an_empty_think_block_of_the_prompt_stands_before_the_answer_as_at_inference() -> None:
    tokenizer = make_tokenizer(EMPTY_BLOCK)
    turns = ChatTurns(tokenizer)
    messages = talk("u: q", "a: a").messages
    assert tokenizer.decode(turns.prompt(messages[:1])) == "<|user|>q</s><|assistant|><think>\n\n</think>\n\n"
    before, answer = turns.turn(messages)
    assert before == turns.prompt(messages[:1])
    assert tokens(tokenizer, answer) == "a </s>"


def test_reasoning_behind_an_empty_think_block_is_refused() -> None:
    with pytest.raises(RowError, match="empty <think> block, but this answer has reasoning"):
        ChatTurns(make_tokenizer(EMPTY_BLOCK)).turn(talk("u: q", "a: <think>x</think>a").messages)


def test_reasoning_goes_on_where_the_prompt_opens_its_block() -> None:
    tokenizer = make_tokenizer(OPEN_BLOCK)
    before, answer = ChatTurns(tokenizer).turn(talk("u: q", "a: x</think>a").messages)
    assert tokenizer.decode(before) == "<|user|>q</s><|assistant|><think>\n"
    assert tokenizer.decode(answer) == "x</think>a</s>"


@pytest.mark.parametrize("answer", ["a", "<think>x</think>a"])
def test_an_answer_that_does_not_go_on_in_an_open_think_block_is_refused(answer: str) -> None:
    with pytest.raises(RowError, match="opens a <think> block"):
        ChatTurns(make_tokenizer(OPEN_BLOCK)).turn(talk("u: q", f"a: {answer}").messages)


def test_tools_and_fields_of_messages_reach_the_template() -> None:
    template = (
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% for m in messages %}{{ m.name }}:{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    messages = (Message("user", "q", extra={"name": "n"}), Message("assistant", "a"))
    before, answer = ChatTurns(tokenizer).turn(messages, ({"name": "t"},))
    assert tokens(tokenizer, before) == "t n : q </s> :"
    assert tokens(tokenizer, answer) == "a </s>"


def test_plain_text_refuses_what_it_has_no_place_for() -> None:
    turns = PlainTurns(make_tokenizer())
    with pytest.raises(RowError, match="no place for `tools`"):
        turns.prompt((Message("user", "q"),), ({"name": "t"},))
    with pytest.raises(RowError, match="no place for `tool_calls`"):
        turns.prompt((Message("assistant", "", extra={"tool_calls": []}),))


@pytest.mark.parametrize("template", [TEMPLATE, THINKING, ALTERNATING, EMPTY_BLOCK, ENDLESS, *TEMPLATES.values()])
def test_a_template_compiled_once_renders_what_transformers_renders(template: str) -> None:
    tokenizer = make_tokenizer(template)
    render = Renderer(tokenizer)
    messages = talk("u: {{ q }}\n", "a: <b> x</think>\u2028 é", "u: ", "a: b").messages
    assert render._compiled is not None
    for count in (1, 2, 3, 4):
        for generation in (False, True):
            turns = [message.as_dict() for message in messages[:count]]
            expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
            assert render(messages[:count], generation) == expected


def test_rows_of_many_are_found_without_a_call_for_each(tokenizer: Any) -> None:
    """`rows` gives None where it falls back to `turn`, so a fast part that never works would go unseen otherwise."""
    chats = [talk("u: q", "a: a", "u: r", "a: b"), talk("s: s", "u: q", "a: ab")]
    for turns in (
        ChatTurns(tokenizer),
        PlainTurns(tokenizer),
        turn_encoder(make_tokenizer(None), "zephyr", "messages"),
    ):
        assert all(row is not None for row in turns.rows(chats))


def test_rows_of_many_leave_to_turn_what_it_refuses_or_splits() -> None:
    turns = ChatTurns(make_tokenizer(THINKING))
    rows = turns.rows([talk("u: q", "a: x</think>a", "u: r", "a: b"), talk("u: q", "a: a"), talk("u: q")])
    assert [row is None for row in rows] == [True, False, True]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself() -> None:
    tokenizer = make_tokenizer()

    class Reversing(type(tokenizer)):  # type: ignore[misc]
        """Turns every text around."""

        def __call__(self, text: str, **options: Any) -> Any:
            """The ids of the text, from its end."""
            return super().__call__(text[::-1], **options)

    tokenizer.__class__ = Reversing
    conversation = Conversation((Message("user", "qr"), Message("assistant", "ab")))
    (row,) = PlainTurns(tokenizer).rows([conversation])
    assert row is not None
    assert tokens(tokenizer, row.ids.tolist()) == "r q b a </s>"


@pytest.mark.parametrize("said", ["a", " ", "s", "<s>", "ssistant", "x</think>b"])
def test_an_answer_that_nothing_precedes_begins_behind_what_does_not_depend_on_it(said: str) -> None:
    tokenizer = make_tokenizer()
    turns = turn_encoder(tokenizer, "tokenizer", "messages")
    before, answer = turns.turn((Message("assistant", said),))
    assert tokenizer.decode(before) == "<s><|assistant|>\n"
    assert tokenizer.decode(answer) == f"{said}</s>"


@pytest.mark.parametrize(
    ("template", "lead"), [("guanaco", " "), ("vicuna", " "), ("alpaca", ""), ("chatml", ""), ("none", "")]
)
def test_what_a_template_puts_before_every_answer_is_known(template: str, lead: str) -> None:
    assert turn_encoder(make_tokenizer(), template, "messages").lead == lead
