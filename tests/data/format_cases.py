"""Rows of every format with the conversations that they become: a new format adds one of each here."""

from __future__ import annotations

from typing import Any

from qlora_cli.data.conversation import Conversation, Message

ASK, SAY = Message("user", "q"), Message("assistant", "a")
QA = Conversation((ASK, SAY))
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}


def talk(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return Conversation(tuple(Message("user" if i % 2 == 0 else "assistant", c) for i, c in enumerate(contents)))


def tree(*replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An OpenAssistant row whose prompt is `q`."""
    return {"prompt": {"text": "q", "role": "prompter", "replies": list(replies), **more}}


def reply(text: Any, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant's node in an OpenAssistant tree."""
    return {"text": text, "role": "assistant", "replies": list(replies), **more}


def ask(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A prompter's node in an OpenAssistant tree."""
    return {"text": text, "role": "prompter", "replies": list(replies), **more}


def messages(*turns: Any) -> dict[str, Any]:
    """A row of `messages`."""
    return {"messages": list(turns)}


def sharegpt(*turns: Any, **more: Any) -> dict[str, Any]:
    """A row of `conversations`."""
    return {"conversations": list(turns), **more}


# The first case of each format is its plainest row, of which `auto` can tell the format.
GOOD: list[tuple[str, dict[str, Any], Conversation]] = [
    ("messages", messages(USER, ASSISTANT), QA),
    (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, ASSISTANT], "id": 3},
        Conversation((Message("system", "s"), SAY)),
    ),
    ("messages", messages(USER, ASSISTANT, USER), Conversation((ASK, SAY, ASK))),
    ("messages", messages({"role": "system", "content": ""}, ASSISTANT), Conversation((Message("system", ""), SAY))),
    (
        "messages",
        messages(
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, ASSISTANT
        ),
        talk("qr", "a"),
    ),
    (
        "messages",
        messages({"role": "assistant", "content": "b", "train": False}, ASSISTANT),
        Conversation((Message("assistant", "b", train=False), SAY)),
    ),
    (
        "messages",
        messages({**USER, "train": None, "weight": None, "name": "u"}, {**ASSISTANT, "train": True, "weight": 1}),
        Conversation((Message("user", "q", extra={"name": "u"}), SAY)),
    ),
    (
        "messages",
        messages(USER, {**ASSISTANT, "reasoning_content": "r", "tool_calls": [], "name": None, "id": 1}),
        Conversation((ASK, Message("assistant", "a", extra={"reasoning_content": "r"}))),
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "", "tool_call_id": "c1", "name": "sum"},
                {"role": "assistant", "tool_calls": [CALL]},
                ASSISTANT,
            ],
            "tools": [TOOL],
        },
        Conversation(
            (
                ASK,
                Message("assistant", "", extra={"tool_calls": [CALL]}),
                Message("tool", "", extra={"name": "sum", "tool_call_id": "c1"}),
                Message("assistant", "", extra={"tool_calls": [CALL]}),
                SAY,
            ),
            (TOOL,),
        ),
    ),
    ("messages", {**messages(USER, ASSISTANT), "tools": None}, QA),
    ("messages", messages({"role": "user", "content": " \n"}, {"role": "assistant", "content": ""}), talk(" \n", "")),
    ("messages", messages({"role": "user", "content": []}, ASSISTANT), talk("", "a")),
    (
        "messages",
        {**messages(USER, ASSISTANT), "tools": '[{"name": "sum"}]'},
        Conversation((ASK, SAY), ({"name": "sum"},)),
    ),
    ("sharegpt", sharegpt(HUMAN, GPT), QA),
    ("sharegpt", sharegpt(GPT, HUMAN, GPT), Conversation((SAY, ASK, SAY))),
    ("sharegpt", sharegpt({"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a", "weight": None}), QA),
    (
        "sharegpt",
        sharegpt(HUMAN, GPT, system="s", tools=[TOOL]),
        Conversation((Message("system", "s"), ASK, SAY), (TOOL,)),
    ),
    ("sharegpt", sharegpt(HUMAN, GPT, system="", tools=""), QA),
    (
        "sharegpt",
        sharegpt({"from": "system", "value": ""}, GPT, system=None),
        Conversation((Message("system", ""), SAY)),
    ),
    (
        "sharegpt",
        sharegpt(
            HUMAN,
            {"from": "function_call", "value": '{"name": "sum", "arguments": {"of": [1]}}'},
            {"from": "observation", "value": "1"},
            {"from": "bard", "value": "b", "train": False},
            tools='[{"name": "sum"}]',
        ),
        Conversation(
            (
                ASK,
                Message(
                    "assistant",
                    "",
                    extra={"tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"of": [1]}}}]},
                ),
                Message("tool", "1"),
                Message("assistant", "b", train=False),
            ),
            ({"name": "sum"},),
        ),
    ),
    ("prompt-completion", {"prompt": "q", "completion": "a", "other": None}, QA),
    (
        "prompt-completion",
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT], "tools": [TOOL]},
        Conversation((ASK, Message("assistant", "a", train=False), ASK, SAY), (TOOL,)),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "output": ""}, talk("q", "")),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, talk("q\n\nx", "a")),
    ("text", {"text": "a"}, Conversation((SAY,))),
    ("text", {"text": " ### Assistant: a\n"}, Conversation((Message("assistant", " ### Assistant: a\n"),))),
    ("oasst", tree(reply("a")), QA),
    ("oasst", tree(reply("b", rank=1), reply("a", rank=0), reply("c", rank=None)), QA),
    ("oasst", tree(reply("b"), reply("a", rank=7.0), reply("c")), QA),
    ("oasst", tree(reply("a", rank=2), reply("b", rank=2)), QA),
    ("oasst", tree(reply("b", rank=0, deleted=True), reply("c", rank=1, review_result=False), reply("a", rank=2)), QA),
    ("oasst", tree(reply("a", ask("r", replies=None)), review_result=True, deleted=False), QA),
    ("oasst", tree(reply("a", ask("r", reply("b")), ask("s", reply("c")))), talk("q", "a", "r", "b")),
    ("guanaco", {"text": "### Human: q### Assistant: a"}, QA),
    ("guanaco", {"text": "### Human: q ### Assistant: a### Human: r\n### Assistant: b\n"}, talk("q", "a", "r", "b\n")),
    ("guanaco", {"text": "### Human:q\nr### Assistant:  a"}, talk("q\nr", " a")),
    ("guanaco", {"text": "### Human: q### Assistant: a\n#### Human: b"}, talk("q", "a\n#### Human: b")),
    ("guanaco", {"text": "### Human: q### Assistant: "}, talk("q", "")),
    ("guanaco", {"text": "### Human: in C#### Assistant: a"}, talk("in C#", "a")),
    ("guanaco", {"text": "\n### Human: q### Assistant: a### Human: r"}, talk("q", "a", "r")),
    ("self-instruct", {"prompt": "q\n\nOutput:", "completion": " a<|endoftext|>"}, talk("q\n\nOutput:", " a")),
    ("self-instruct", {"prompt": "q", "completion": "a"}, QA),
    ("self-instruct", {"prompt": "q", "completion": "<|endoftext|>"}, talk("q", "")),
    ("chip2", {"text": "<human>: q\n<bot>: a"}, QA),
    ("chip2", {"text": "<human>: q\n<bot>: a <bot>: b\n\n<human>: r"}, talk("q", "a <bot>: b\n", "r")),
    ("hh-rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, QA),
    ("hh-rlhf", {"chosen": "Human: q\nHuman: r\n\nAssistant: a"}, talk("q\nHuman: r", "a")),
    ("longform", {"input": "q", "output": "a", "source": "C4"}, QA),
    (
        "unnatural-instructions",
        {"instances": [{"instruction_with_input": "q", "input": "x", "constraints": "None.", "output": "a"}]},
        QA,
    ),
    (
        "unnatural-instructions",
        {
            "instruction": "i",
            "instances": [{"instruction_with_input": "q", "output": "a"}, {"instruction_with_input": "r"}],
            "reformulations": [{"instruction": "q2"}],
        },
        QA,
    ),
]
