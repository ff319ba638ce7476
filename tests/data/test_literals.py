"""Every row format through every template that is shipped: a literal row in, literal tokens, ids and labels out.

Tokens in brackets carry loss; Ċ is a newline, Ġ a space. The vocabulary has the words that templates write as tokens of
their own, so that the rows are short enough to be read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.batches import collate
from qlora_cli.data.encode import encode, encode_many
from qlora_cli.data.formats import FORMATS
from qlora_cli.data.templates import TEMPLATES
from qlora_cli.data.turns import TurnEncoder, turn_encoder
from tests.data.conftest import marked
from tests.data.format_cases import GPT, HUMAN, USER, ask, reply, tree

WORDS = ["###ĠInstruction:", "###ĠResponse:", "###ĠHuman:", "###ĠAssistant:", "USER:", "ASSISTANT:"]
ROLES = ["system", "user", "assistant", "ĊĊ"]

# By format, the kind of its conversation and the row.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": (
        "system",
        {"messages": [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "a"}]},
    ),
    "sharegpt": ("system", {"conversations": [HUMAN, GPT], "system": "S"}),
    "prompt-completion": ("pair", {"prompt": "q", "completion": "a"}),
    "alpaca": ("input", {"instruction": "q", "input": "x", "output": "a"}),
    "text": ("text", {"text": "b"}),
    "oasst": ("turns", tree(reply("c", rank=1), reply("a", ask("r", reply("b")), rank=0))),
    "guanaco": ("turns", {"text": "### Human: q### Assistant: a### Human: r### Assistant: b"}),
    "self-instruct": ("pair", {"prompt": "q", "completion": "a<|endoftext|>"}),
    "chip2": ("turns", {"text": "<human>: q\n<bot>: a\n<human>: r\n<bot>: b"}),
    "hh-rlhf": (
        "turns",
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b", "rejected": "\n\nHuman: q"},
    ),
    "longform": ("pair", {"input": "q", "output": "a"}),
    "unnatural-instructions": ("pair", {"instances": [{"instruction_with_input": "q", "output": "a"}]}),
}

# By template, the tokens of each kind.
TOKENS: dict[str, dict[str, str]] = {
    "none": {
        "pair": "q [a] [</s>]",
        "input": "q ĊĊ x [a] [</s>]",
        "turns": "q [a] [</s>] r [b] [</s>]",
        "system": "S q [a] [</s>]",
        "text": "[b] [</s>]",
    },
    "chatml": {
        "pair": "<|im_start|> user Ċ q <|im_end|> Ċ <|im_start|> assistant Ċ [a] [<|im_end|>]",
        "input": "<|im_start|> user Ċ q ĊĊ x <|im_end|> Ċ <|im_start|> assistant Ċ [a] [<|im_end|>]",
        "turns": "<|im_start|> user Ċ q <|im_end|> Ċ <|im_start|> assistant Ċ [a] [<|im_end|>] Ċ "
        "<|im_start|> user Ċ r <|im_end|> Ċ <|im_start|> assistant Ċ [b] [<|im_end|>]",
        "system": "<|im_start|> system Ċ S <|im_end|> Ċ <|im_start|> user Ċ q <|im_end|> Ċ "
        "<|im_start|> assistant Ċ [a] [<|im_end|>]",
        "text": "<|im_start|> assistant Ċ [b] [<|im_end|>]",
    },
    "llama3": {
        "pair": "<s> <|start_header_id|> user <|end_header_id|> ĊĊ q <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [a] [<|eot_id|>]",
        "input": "<s> <|start_header_id|> user <|end_header_id|> ĊĊ q ĊĊ x <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [a] [<|eot_id|>]",
        "turns": "<s> <|start_header_id|> user <|end_header_id|> ĊĊ q <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [a] [<|eot_id|>] "
        "<|start_header_id|> user <|end_header_id|> ĊĊ r <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [b] [<|eot_id|>]",
        "system": "<s> <|start_header_id|> system <|end_header_id|> ĊĊ S <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ĊĊ q <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ [a] [<|eot_id|>]",
        "text": "<s> <|start_header_id|> assistant <|end_header_id|> ĊĊ [b] [<|eot_id|>]",
    },
    "alpaca": {
        "pair": "<s> ###ĠInstruction: Ċ q ĊĊ ###ĠResponse: Ċ [a] [</s>]",
        "input": "<s> ###ĠInstruction: Ċ q ĊĊ x ĊĊ ###ĠResponse: Ċ [a] [</s>]",
        "turns": "<s> ###ĠInstruction: Ċ q ĊĊ ###ĠResponse: Ċ [a] [</s>] ĊĊ "
        "###ĠInstruction: Ċ r ĊĊ ###ĠResponse: Ċ [b] [</s>]",
        "system": "<s> S ĊĊ ###ĠInstruction: Ċ q ĊĊ ###ĠResponse: Ċ [a] [</s>]",
        "text": "<s> ###ĠResponse: Ċ [b] [</s>]",
    },
    "guanaco": {
        "pair": "<s> ###ĠHuman: Ġ q Ċ ###ĠAssistant: [Ġ] [a] [</s>]",
        "input": "<s> ###ĠHuman: Ġ q ĊĊ x Ċ ###ĠAssistant: [Ġ] [a] [</s>]",
        "turns": "<s> ###ĠHuman: Ġ q Ċ ###ĠAssistant: [Ġ] [a] [</s>] Ċ ###ĠHuman: Ġ r Ċ ###ĠAssistant: [Ġ] [b] [</s>]",
        "system": "<s> S Ċ ###ĠHuman: Ġ q Ċ ###ĠAssistant: [Ġ] [a] [</s>]",
        "text": "<s> ###ĠAssistant: [Ġ] [b] [</s>]",
    },
    "vicuna": {
        "pair": "<s> USER: Ġ q Ġ ASSISTANT: [Ġ] [a] [</s>]",
        "input": "<s> USER: Ġ q ĊĊ x Ġ ASSISTANT: [Ġ] [a] [</s>]",
        "turns": "<s> USER: Ġ q Ġ ASSISTANT: [Ġ] [a] [</s>] USER: Ġ r Ġ ASSISTANT: [Ġ] [b] [</s>]",
        "system": "<s> S Ġ USER: Ġ q Ġ ASSISTANT: [Ġ] [a] [</s>]",
        "text": "<s> ASSISTANT: [Ġ] [b] [</s>]",
    },
    "zephyr": {
        "pair": "<s> < | user | > Ċ q </s> Ċ < | assistant | > Ċ [a] [</s>]",
        "input": "<s> < | user | > Ċ q ĊĊ x </s> Ċ < | assistant | > Ċ [a] [</s>]",
        "turns": "<s> < | user | > Ċ q </s> Ċ < | assistant | > Ċ [a] [</s>] Ċ "
        "< | user | > Ċ r </s> Ċ < | assistant | > Ċ [b] [</s>]",
        "system": "<s> < | system | > Ċ S </s> Ċ < | user | > Ċ q </s> Ċ < | assistant | > Ċ [a] [</s>]",
        "text": "<s> < | assistant | > Ċ [b] [</s>]",
    },
}

# By template, the ids of a question and its answer, and which of them the model is to predict.
IDS: dict[str, tuple[list[int], list[int]]] = {
    "none": ([83, 67, 2], [67, 2]),
    "chatml": ([329, 319, 201, 83, 330, 201, 329, 327, 201, 67, 330], [67, 330]),
    "llama3": ([1, 329, 319, 330, 328, 83, 331, 329, 327, 330, 328, 67, 331], [67, 331]),
    "alpaca": ([1, 273, 201, 83, 328, 282, 201, 67, 2], [67, 2]),
    "guanaco": ([1, 288, 223, 83, 201, 298, 223, 67, 2], [223, 67, 2]),
    "vicuna": ([1, 302, 223, 83, 223, 311, 223, 67, 2], [223, 67, 2]),
    "zephyr": ([1, 30, 94, 319, 94, 32, 201, 83, 2, 201, 30, 94, 327, 94, 32, 201, 67, 2], [67, 2]),
}


def make_tokenizer() -> Any:
    """Bytes, and the words of the templates, each made by merges from left to right."""
    pairs = [(word[:end], word[end]) for word in [*WORDS, *ROLES] for end in range(1, len(word))]
    merges = list(dict.fromkeys(pairs))
    grown = dict.fromkeys(left + right for left, right in merges)
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *grown]
    inner = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def made(template: str) -> tuple[Any, TurnEncoder]:
    """The tokenizer with a template, and the encoder."""
    tokenizer = make_tokenizer()
    return tokenizer, turn_encoder(tokenizer, template, "messages")


def test_every_format_and_every_template_has_its_literals() -> None:
    assert set(ROWS) == set(FORMATS)
    assert set(TOKENS) == set(IDS) == {*TEMPLATES, "none"}
    assert all(set(kinds) == {kind for kind, _ in ROWS.values()} for kinds in TOKENS.values())


@pytest.mark.parametrize("template", TOKENS)
@pytest.mark.parametrize("row_format", ROWS)
def test_a_row_becomes_its_literal_tokens_with_loss_on_its_answers(row_format: str, template: str) -> None:
    kind, row = ROWS[row_format]
    tokenizer, turns = made(template)
    conversation = FORMATS[row_format].build(row)
    (encoded,) = encode(conversation, turns, "assistant")
    assert marked(encoded, tokenizer) == TOKENS[template][kind]
    (many,) = encode_many([conversation], turns, "assistant")
    assert isinstance(many, list)
    assert [(ids.tolist(), loss.tolist()) for ids, loss in many] == [(encoded.ids.tolist(), encoded.loss.tolist())]


@pytest.mark.parametrize("template", IDS)
def test_the_ids_of_a_pair_and_the_labels_that_the_model_is_to_predict(template: str) -> None:
    ids, labels = IDS[template]
    (encoded,) = encode(FORMATS["longform"].build(ROWS["longform"][1]), made(template)[1], "assistant")
    batch = collate([encoded])
    assert encoded.ids.tolist() == batch.ids[0].tolist() == ids
    assert batch.labels.tolist() == labels
    assert batch.targets[0].tolist() == [False] * (len(ids) - len(labels) - 1) + [True] * len(labels) + [False]
