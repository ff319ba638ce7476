"""Rows that their format refuses, with what is said of each: a new format adds one here."""

from __future__ import annotations

from typing import Any

from tests.data.format_cases import ASSISTANT, CALL, GPT, HUMAN, USER, messages, reply, sharegpt, tree

DEEP: Any = 1
for _ in range(101):
    DEEP = [DEEP]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"text": "a", "id": 1}, "field `messages` is missing (the row has: `id`, `text`)"),
    ("messages", {}, "field `messages` is missing (the row has: no fields)"),
    (
        "messages",
        dict.fromkeys("abcdefghijklm"),
        "field `messages` is missing (the row has: `a`, `b`, `c`, `d`, `e`, `f`, `g`, `h`, `i`, `j`, `k`, `l` and "
        "1 more)",
    ),
    ("messages", {"messages": "hi"}, "field `messages` must be a list of messages, but is text"),
    ("messages", {"messages": []}, "field `messages` must be a list of messages, but is empty"),
    ("messages", messages("hi"), "messages[0] must be an object with `role` and `content`, but is text"),
    ("messages", messages({"role": "user"}), "messages[0].content is missing (it has: `role`)"),
    ("messages", messages({}), "messages[0].role is missing (it has: nothing)"),
    ("messages", messages({"role": 1, "content": "q"}), "messages[0].role must be text, but is a number"),
    ("messages", messages({"role": "user", "content": None}), "messages[0].content must be text, but is null"),
    (
        "messages",
        messages(USER, {"role": "human", "content": "q"}),
        "messages[1].role is `human`; known roles are system, user, assistant, tool",
    ),
    (
        "messages",
        messages({"role": "\x1b[2J\ud83d", "content": "q"}),
        "messages[0].role is not Unicode text: surrogates not allowed (character 5)",
    ),
    (
        "messages",
        messages({"role": "\x1b[2J" + "x" * 99, "content": "q"}),
        f"messages[0].role is `\\x1b[2J{'x' * 56}...`; known roles are system, user, assistant, tool",
    ),
    ("messages", messages({"\ud83d": "user"}), "messages[0].role is missing (it has: `\\ud83d`)"),
    ("messages", messages(USER), "field `messages` has no assistant turn: there is nothing to learn in it"),
    (
        "messages",
        messages(USER, {**ASSISTANT, "train": False}),
        "field `messages` has `train: false` on every assistant turn: there is nothing to learn in it",
    ),
    ("messages", messages(USER, {**ASSISTANT, "train": 0}), "messages[1].train must be true or false, but is a number"),
    ("messages", messages(USER, {**ASSISTANT, "weight": 0}), "messages[1].weight is not read"),
    ("messages", messages(USER, {**ASSISTANT, "function_call": {}}), "messages[1].function_call is not read"),
    (
        "messages",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT),
        "messages[0].content[0].type is `image_url`; only `text` parts can be read",
    ),
    (
        "messages",
        messages({"role": "user", "content": ["q"]}, ASSISTANT),
        "messages[0].content[0] must be an object with `type` and `text`, but is text",
    ),
    (
        "messages",
        messages({"role": "user", "content": "q", "tool_calls": [CALL]}, ASSISTANT),
        "messages[0].tool_calls belongs to a turn of role assistant, but this one's is user",
    ),
    (
        "messages",
        messages(USER, {"role": "assistant", "tool_calls": CALL}),
        "messages[1].tool_calls must be a list of objects, but is an object",
    ),
    (
        "messages",
        messages(USER, {"role": "assistant", "tool_calls": ["sum"]}),
        "messages[1].tool_calls[0] must be an object with a function's name, but is text",
    ),
    (
        "messages",
        messages(USER, {"role": "assistant", "tool_calls": [{"a": {"b": ["\udc00"]}}]}),
        "messages[1].tool_calls[0] is not Unicode text: surrogates not allowed (character 1)",
    ),
    (
        "messages",
        messages(USER, {"role": "assistant", "tool_calls": [{"a": DEEP}]}),
        "messages[1].tool_calls[0] is nested more than 100 levels deep",
    ),
    (
        "messages",
        messages(USER, {"role": "assistant", "tool_calls": [{"a": b"x"}]}),
        "messages[1].tool_calls[0] holds a value that JSON does not have: bytes",
    ),
    ("messages", messages(USER, {**ASSISTANT, "name": 7}), "messages[1].name must be text, but is a number"),
    (
        "messages",
        {**messages(USER, ASSISTANT), "tools": {"name": "sum"}},
        "field `tools` must be a list of objects, but is an object",
    ),
    (
        "messages",
        messages({"role": "assistant", "content": "\udc00"}),
        "messages[0].content is not Unicode text: surrogates not allowed (character 1)",
    ),
    ("sharegpt", {"messages": []}, "field `conversations` is missing (the row has: `messages`)"),
    ("sharegpt", sharegpt(USER, ASSISTANT), "conversations[0].from is missing (it has: `content`, `role`)"),
    (
        "sharegpt",
        sharegpt(HUMAN, {"from": "bot", "value": "a"}),
        "conversations[1].from is `bot`; known speakers are system, human, user, gpt, assistant, model, chatgpt, bing, "
        "bard, tool, observation, function_response, function_call",
    ),
    ("sharegpt", sharegpt(HUMAN), "field `conversations` has no assistant turn: there is nothing to learn in it"),
    (
        "sharegpt",
        sharegpt(HUMAN, {"from": "function_call", "value": "sum(1)"}),
        "conversations[1].value is not JSON: Expecting value: line 1 column 1 (char 0)",
    ),
    (
        "sharegpt",
        sharegpt(HUMAN, {"from": "function_call", "value": '{"name": "sum"}'}),
        "conversations[1].value.arguments is missing (it has: `name`)",
    ),
    (
        "sharegpt",
        sharegpt(HUMAN, {"from": "function_call", "value": "[]"}),
        "conversations[1].value must be a function's `name` and `arguments`, but is an empty list",
    ),
    (
        "sharegpt",
        sharegpt({"from": "system", "value": "s"}, GPT, system="t"),
        "field `system` and a turn of `conversations` both are the system's",
    ),
    ("sharegpt", sharegpt(GPT, system=["s"]), "field `system` must be text, but is a list"),
    ("sharegpt", sharegpt(GPT, tools="sum"), "field `tools` is not JSON: Expecting value: line 1 column 1 (char 0)"),
    ("prompt-completion", {"prompt": "q"}, "field `completion` is missing (the row has: `prompt`)"),
    ("prompt-completion", {"prompt": {}, "completion": "a"}, "field `prompt` must be text, but is an object"),
    (
        "prompt-completion",
        {"prompt": [USER], "completion": "a"},
        "field `completion` must be a list of messages, but is text",
    ),
    (
        "prompt-completion",
        {"prompt": [USER, ASSISTANT], "completion": [USER]},
        "field `completion` has no assistant turn: there is nothing to learn in it",
    ),
    ("alpaca", {"instruction": "q", "output": 7}, "field `output` must be text, but is a number"),
    ("alpaca", {"instruction": "q", "input": {"a": 1}, "output": "a"}, "field `input` must be text, but is an object"),
    ("alpaca", {"instruction": "q", "input": False, "output": "a"}, "field `input` must be text, but is a boolean"),
    ("text", {"text": None}, "field `text` must be text, but is null"),
    ("text", {"text": True}, "field `text` must be text, but is a boolean"),
    ("text", {"text": "a\ud83d"}, "field `text` is not Unicode text: surrogates not allowed (character 2)"),
    ("oasst", {"prompt": "q"}, "field `prompt` must be an object with `text`, `role` and `replies`, but is text"),
    ("oasst", tree(), "prompt has no reply that can be used: there is nothing to learn in it"),
    ("oasst", tree(reply("a"), deleted=True), "prompt was deleted or rejected in review"),
    ("oasst", tree(reply("a", deleted="no")), "prompt.replies[0].deleted must be true or false, but is text"),
    ("oasst", tree(reply("a"), replies={}), "prompt.replies must be a list of replies, but is an object"),
    (
        "oasst",
        tree(reply("a", reply("b"))),
        "prompt.replies[0].replies[0].role must be `prompter`, but is `assistant`: "
        "speakers take turns, the prompter first",
    ),
    ("oasst", tree(reply(None)), "prompt.replies[0].text must be text, but is null"),
    ("oasst", tree(reply("a", rank=True)), "prompt.replies[0].rank must be a whole number, but is a boolean"),
    ("oasst", tree(reply("a", rank=float("nan"))), "prompt.replies[0].rank must be a whole number, but is nan"),
    ("guanaco", {"text": ""}, "field `text` has no marker of a turn"),
    ("guanaco", {"text": "q"}, "field `text` has no marker of a turn"),
    (
        "guanaco",
        {"text": "Once:\n### Human: q### Assistant: a"},
        "field `text` has text before its first marker (character 6)",
    ),
    (
        "guanaco",
        {"text": "### Assistant: a### Human: q"},
        "field `text` must begin with the human's turn, but begins with the assistant's",
    ),
    (
        "guanaco",
        {"text": "### Human: q### Assistant: a### Assistant: b"},
        "field `text` has two turns of the assistant one after the other (the second at character 33)",
    ),
    ("guanaco", {"text": "### Human: q"}, "field `text` has no assistant turn: there is nothing to learn in it"),
    ("self-instruct", {"prompt": "q", "completion": ["a"]}, "field `completion` must be text, but is a list"),
    ("chip2", {"text": "<bot>: a"}, "field `text` must begin with the human's turn, but begins with the bot's"),
    ("chip2", {"text": "Hi <human>: q\n<bot>: a"}, "field `text` has text before its first marker (character 14)"),
    ("hh-rlhf", {"chosen": "\n\nHuman: q"}, "field `chosen` has no assistant turn: there is nothing to learn in it"),
    ("hh-rlhf", {"chosen": [USER, ASSISTANT]}, "field `chosen` must be text, but is a list"),
    ("longform", {"input": "q"}, "field `output` is missing (the row has: `input`)"),
    ("unnatural-instructions", {"instances": []}, "field `instances` must be a list of instances, but is empty"),
    (
        "unnatural-instructions",
        {"instances": [{"input": "q", "output": "a"}]},
        "instances[0].instruction_with_input is missing (it has: `input`, `output`)",
    ),
]
