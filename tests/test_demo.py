"""What the demo stands on: its base, its rows, and how it counts."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import demo
import make_tiny_base
import pytest
import tiny_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = make_tiny_base.SHIPPED


def test_the_shipped_base_is_what_its_checksum_says_and_small_enough() -> None:
    weights = (BASE / "model.safetensors").read_bytes()
    assert (BASE / "model.safetensors.sha256").read_text().split() == [
        hashlib.sha256(weights).hexdigest(),
        "model.safetensors",
    ]
    assert len(weights) <= 8_000_000
    assert 2e6 <= AutoModelForCausalLM.from_pretrained(BASE).num_parameters() <= 10e6


def test_the_shipped_base_still_copies_from_what_it_has_just_read() -> None:
    assert make_tiny_base.quality(BASE).accuracy >= 0.85


def test_a_tampered_base_is_never_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "shipped"
    make_tiny_base.copy_base(BASE, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    monkeypatch.setattr(make_tiny_base, "SHIPPED", copy)
    with pytest.raises(SystemExit, match="does not match its sha256"):
        make_tiny_base.install_shipped(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_its_template_is_prefix_stable_and_ends_every_turn() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    texts = [tokenizer.apply_chat_template(turns[: i + 1], tokenize=False) for i in range(len(turns))]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter)
        assert shorter.endswith("<|end|>")
    asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert texts[2].startswith(asked)


def test_rows_repeat_with_their_seed_and_held_out_ones_share_nothing_with_training_ones() -> None:
    train, held_out = tiny_corpus.instruction_rows(0, 400), tiny_corpus.instruction_rows(0, 200, held_out=True)
    assert train == tiny_corpus.instruction_rows(0, 400) != tiny_corpus.instruction_rows(1, 400)
    tiny_corpus.assert_disjoint(train, held_out)
    with pytest.raises(AssertionError, match="share"):
        tiny_corpus.assert_disjoint(train, train[:1])
    pretrained = {
        word
        for chat in tiny_corpus.pretraining_chats(0, 300)
        for message in chat
        for word in message["content"].replace('"', " ").replace(",", " ").replace(".", " ").split()
    }
    names = {json.loads(row["messages"][1]["content"])["city"] for row in held_out}
    assert len(names) > 100
    assert not names & pretrained


def test_only_exact_answers_count() -> None:
    answers = demo.Answers(["p"] * 4, ["a", "b", "c", "d"], ["a", "B", "", "x"], ["a", "b", "c", "d "])
    assert (answers.matches(answers.before), answers.matches(answers.after)) == (0.25, 0.75)


def test_an_earlier_run_is_moved_aside_and_never_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        run.mkdir()
        (run / "mine").write_text(str(number))
        demo.move_aside(run)
    demo.move_aside(run)
    assert {p.name: (p / "mine").read_text() for p in tmp_path.iterdir()} == {"run.1": "1", "run.2": "2"}
