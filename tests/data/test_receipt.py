"""The receipt: no row is lost without a count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.dataset import Setting, load_data
from qlora_cli.data.receipt import DataReceipt, SourceReceipt, SplitReceipt
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DataSection
from tests.conftest import make_tokenizer, write_jsonl
from tests.data.conftest import THINKING

texts = st.sampled_from(["", "a", "x</think>a", "xx</think>b", "c" * 40])
pairs = st.tuples(texts, texts).map(lambda pair: [("user", pair[0]), ("assistant", pair[1])])
conversations = st.tuples(st.lists(pairs, min_size=1, max_size=4), st.booleans())
policies = st.fixed_dictionaries(
    {
        "max_length": st.sampled_from([4, 16, 60, 400]),
        "too_long": st.sampled_from(["drop", "truncate"]),
        "loss_on": st.sampled_from(["assistant", "assistant", "last", "all"]),
        "eval_split": st.sampled_from([None, 1, 3, 0.3]),
        "template": st.sampled_from(["tokenizer", "tokenizer", "none"]),
    }
)


def as_row(conversation: tuple[list[list[tuple[str, str]]], bool]) -> dict[str, Any]:
    turns = [turn for pair in conversation[0] for turn in pair] + [("user", "?")] * conversation[1]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("receipt") / "rows.jsonl"


def fates(place: Path, tokenizer: Any, drawn: list[Any], policy: dict[str, Any]) -> set[str]:
    """Loads the drawn rows, holds the receipt against them, and says which fates they met."""
    write_jsonl(place, [as_row(conversation) for conversation in drawn])
    try:
        data = load_data(DataSection.model_validate({"train": str(place)} | policy), Setting(tokenizer))
    except DataError as error:
        assert any(words in str(error) for words in ("is left", "are left", "distinct rows"))
        return {"refused"}
    (source,) = data.receipt.sources
    assert source.read == len(drawn) == source.kept + source.held_out + sum(source.dropped.values())
    assert source.cut <= source.kept + source.held_out
    assert source.trailing_turns == sum(trailing for _, trailing in drawn)
    assert (data.receipt.train.rows, data.receipt.held_out.rows) == (source.kept, source.held_out)
    for row in (*data.train, *data.held_out):
        assert 0 < len(row) <= policy["max_length"]
        assert row.targets > 0 and row.loss[-1] and int(row.ids[-1]) in data.stop_ids
    named = {"dropped": source.dropped, "cut": source.cut, "held out": source.held_out}
    return {name for name, count in named.items() if count} | (
        {"split"} if data.receipt.train.sequences > source.kept else set()
    )


def test_every_row_read_is_kept_held_out_or_dropped_and_every_kept_one_ends_in_a_target(place: Path) -> None:
    met: set[str] = set()
    tokenizer = make_tokenizer(THINKING)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(conversations, min_size=1, max_size=8), policies)
    def check(drawn: list[Any], policy: dict[str, Any]) -> None:
        met.update(fates(place, tokenizer, drawn, policy))

    check()
    assert met == {"refused", "dropped", "cut", "held out", "split"}


def test_a_split_counts_tokens_targets_and_length_quantiles() -> None:
    split = SplitReceipt.of(3, np.array([5, 10, 20, 40]), np.array([2, 2, 2, 2]))
    assert split == SplitReceipt(3, 4, 75, 8, {"0%": 5, "50%": 10, "90%": 20, "100%": 40})


def test_an_empty_split_is_all_zeros() -> None:
    none = np.array([], np.int64)
    assert SplitReceipt.of(0, none, none) == SplitReceipt(0, 0, 0, 0, {"0%": 0, "50%": 0, "90%": 0, "100%": 0})


def receipt() -> DataReceipt:
    """One file of whose 1,000 rows every fate has a few."""
    train = SplitReceipt.of(900, np.full(950, 8), np.full(950, 2))
    source = SourceReceipt(
        source="rows.jsonl",
        files=("rows.jsonl",),
        format="messages",
        sha256="ab" * 32,
        read=1000,
        kept=900,
        held_out=60,
        left_out=0,
        cut=7,
        duplicate=5,
        overlap=0,
        bad=0,
        trailing_turns=3,
        dropped={"longer than 64 tokens": 40},
        trained=train,
    )
    return DataReceipt((source,), train, SplitReceipt.of(60, np.full(60, 8), np.full(60, 4)), packing=0.984)


def test_the_receipt_says_on_the_console_what_became_of_the_rows() -> None:
    assert receipt().lines() == [
        "rows.jsonl: 1,000 rows read, 900 kept, 60 held out, 40 dropped (longer than 64 tokens), 7 cut, "
        "5 duplicates, 3 with unanswered last turns left off",
        "train: 900 rows as 950 sequences, 7,600 tokens, 1,900 carry loss (25%); "
        "lengths shortest 8, median 8, 90% 8, longest 8",
        "held out: 60 rows, 480 tokens, 240 carry loss (50%); lengths shortest 8, median 8, 90% 8, longest 8",
        "packed: 98.4% of positions hold tokens",
    ]


def test_the_receipt_is_plain_json() -> None:
    values = json.loads(json.dumps(receipt().as_json()))
    assert values["sources"][0]["dropped"] == {"longer than 64 tokens": 40}
    assert values["train"]["supervised_tokens"] == 1900
    assert set(values) == {"sources", "train", "held_out", "packing", "notes"}


def test_the_source_hash_follows_the_content_and_not_the_order_of_rows(place: Path, tokenizer: Any) -> None:
    rows = [{"text": "a"}, {"text": "b"}]

    def digest(values: list[dict[str, str]]) -> str:
        section = DataSection(train=str(write_jsonl(place, values)), format="text")
        return load_data(section, Setting(tokenizer)).receipt.sources[0].sha256

    assert digest(rows) == digest(rows[::-1])
    assert digest(rows) != digest([*rows, rows[0]])
    assert len(digest(rows)) == 64
