"""Streamed text: exact, never half a character, and of the same cost for every token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from qlora_cli.workflows.text import WINDOW, TextStream
from tests.conftest import make_tokenizer

Decode = Callable[[Sequence[int]], str]


def byte_level() -> Decode:
    """One token per byte: most characters below take several."""
    tokenizer: Any = make_tokenizer()
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def sentence_piece() -> Decode:
    """Llama 2's decoder: words with a leading space, which is dropped at the very start, and bytes for the rest."""
    words = ["▁the", "▁a", "▁", "s", "ing", ",", "é"]
    vocab = {token: index for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return lambda ids: str(tokenizer.decode(list(ids)))


def pieces_of(decode: Decode, ids: Sequence[int]) -> list[str]:
    """What is shown, token by token."""
    stream = TextStream(decode)
    return [*(stream.add(token) for token in ids), stream.rest()]


CHARACTERS = [[token] for token in range(7)] + [[7 + byte for byte in char.encode()] for char in "\n\n~ñ日😀"]
BYTES = [[token] for token in range(261)]


@pytest.mark.parametrize(("make", "units"), [(byte_level, BYTES), (sentence_piece, CHARACTERS)])
def test_the_pieces_are_the_text_of_all_tokens(make: Callable[[], Decode], units: list[list[int]]) -> None:
    decode, draw = make(), random.Random(0)
    for length in (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 300):
        for _ in range(20):
            ids = [token for _ in range(length) for token in draw.choice(units)]
            assert "".join(pieces_of(decode, ids)) == decode(ids)


def test_words_with_a_leading_space_keep_it_across_windows() -> None:
    ids = [0, 1] * 100
    assert "".join(pieces_of(sentence_piece(), ids)) == " ".join(["the a"] * 100)


def test_no_piece_ends_within_a_character() -> None:
    tokenizer: Any = make_tokenizer()
    text = "naïve 日本語 😀 fin " * 20
    pieces = pieces_of(byte_level(), tokenizer(text, add_special_tokens=False).input_ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "😀" in pieces


def test_a_long_answer_costs_the_same_for_each_token() -> None:
    for make, ids in ((byte_level, [70] * 4000), (sentence_piece, [0, 1] * 2000)):
        decode, decoded = make(), list[int]()

        def counted(ids: Sequence[int], decode: Decode = decode, decoded: list[int] = decoded) -> str:
            decoded.append(len(ids))
            return decode(ids)

        pieces_of(counted, ids)
        assert max(decoded) <= 2 * WINDOW
        assert sum(decoded) <= 4000 * 2 * WINDOW
