"""Multiple choice against a slow twin: one prompt at a time, no padding, letters looked up another way."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_cli.errors import DataError, NonFiniteError
from qlora_cli.evaluation.choice_rows import EncodedQuestions, Questions, encode_questions, read_questions
from qlora_cli.evaluation.choices import (
    ChoiceResult,
    Tally,
    evaluate_choices,
    letter_log_probabilities,
    mean_over_subjects,
)
from qlora_cli.evaluation.intervals import wilson
from qlora_cli.evaluation.paired import Interval
from qlora_cli.model.engine import build_engine
from qlora_cli.model.ranks import Ranks
from tests.conftest import make_llama, make_tokenizer, write_jsonl
from tests.model.test_lora import adapted

CPU = torch.device("cpu")
TOPICS = ["rocks", "a river that is long", "stars and the moon", "tea"]


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A question; subjects have 5, 3 and 1 of each 9 rows, and lengths differ."""
    asked = f"Which is {number}, of {TOPICS[number % 4]}?\nA. {number}\nB. {number * 7}\nC. x\nD. y\nAnswer:"
    subject = ["law", "law", "law", "law", "law", "art", "art", "art", "zoology"][number % 9]
    return {"input": asked, "output": "ABCD"[number * 5 % 4], "subject": subject} | changes


ROWS = [row(number) for number in range(18)]


@pytest.fixture
def questions(tmp_path: Path) -> Questions:
    """18 rows of 3 subjects."""
    return read_questions(str(write_jsonl(tmp_path / "mmlu.jsonl", ROWS)))


def wrap(tokenizer: Any) -> Any:
    """A `tokenizers` tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level_bpe(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Bytes, with ` A` to ` D` as tokens of their own, as in GPT-2; `merges` come on top."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    all_merges = [*(("Ġ", letter) for letter in "ABCD"), *merges]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(a + b for a, b in all_merges)]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=all_merges))
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s+(?!\S)|\s+"), "isolated")  # so that `:A` is one word
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return wrap(bpe)


def sentencepiece_like() -> Any:
    """A space is the beginning of the next token; BOS is put before every text, as LLaMA's tokenizer does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["▁", *(f"▁{letter}" for letter in "ABCD"), *map(chr, range(33, 127)), "\n", "▁Answer"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -len(pieces) / len(piece)) for piece in pieces)]
    unigram = Tokenizer(models.Unigram(vocab, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    unigram.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrap(unigram)


BEFORE = {"bytes": [], "bpe": [], "sentencepiece": [1]}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": make_tokenizer,
    "bpe": byte_level_bpe,
    "sentencepiece": sentencepiece_like,
}


def encode(tokenizer: Any, questions: Questions, max_length: int = 128) -> EncodedQuestions:
    """For the tiny model, which has 128 positions."""
    return encode_questions(tokenizer, questions, max_length)


def evaluate(model: Any, encoded: EncodedQuestions, batch_size: int = 4) -> ChoiceResult:
    """In this process."""
    return evaluate_choices(model, encoded, batch_size, Ranks(CPU))


def twin(model: Any, kind: str, text: str, between: str) -> list[float] | None:
    """The letters' probabilities behind one prompt, by the model's plain forward over the whole vocabulary; a letter's
    token is the only one at the prompt's end that is, as text, that letter. None where there is no such token."""
    tokenizer = TOKENIZERS[kind]()
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    prompt = [vocabulary[i] for i in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
    letters = []
    for letter in "ABCD":
        whole = tokenizer.backend_tokenizer.encode(text + between + letter, add_special_tokens=False).tokens
        spelled = whole[-1].replace("Ġ", " ").replace("▁", " ")
        if spelled != between + letter or whole[:-1] != prompt:
            return None
        letters.append(tokenizer.get_vocab()[whole[-1]])
    ids = torch.tensor([BEFORE[kind] + [tokenizer.get_vocab()[token] for token in prompt]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    chances = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
    return [float(chances[token]) for token in letters]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_row_is_chosen_as_a_slow_twin_chooses_it(
    kind: str, batch_size: int, base: Path, questions: Questions
) -> None:
    model, layers = adapted(base)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=1.0)  # so that what is chosen depends on the prompt
    found = evaluate(model.eval(), encode(TOKENIZERS[kind](), questions), batch_size)
    slow = {
        form: [twin(model, kind, each["input"], between) for each in ROWS]
        for form, between in (("space", " "), ("none", ""))
    }
    usable = {form: rows for form, rows in slow.items() if None not in rows}
    masses = {form: sum(map(sum, rows)) / len(rows) for form, rows in usable.items()}  # type: ignore[arg-type]
    assert found.masses == pytest.approx(masses, rel=1e-4)
    assert found.form == max(masses, key=lambda form: masses[form])
    assert len(found.outcomes) == len(ROWS)
    for number, (outcome, expected) in enumerate(zip(found.outcomes, usable[found.form], strict=True)):
        assert expected is not None
        chances = [math.exp(value) for value in outcome.log_probabilities.values()]
        assert chances == pytest.approx(expected, rel=2e-4)
        assert outcome.chosen == "ABCD"[expected.index(max(expected))]
        assert (outcome.wanted, outcome.subject) == (ROWS[number]["output"], ROWS[number]["subject"])
        assert outcome.where.endswith(f"mmlu.jsonl:{number + 1}")
        assert outcome.right is (outcome.chosen == ROWS[number]["output"])
    assert len({outcome.chosen for outcome in found.outcomes}) > 1, "a model that always says the same shows little"


def test_which_forms_can_be_used_depends_on_the_tokenizer(questions: Questions) -> None:
    forms = {kind: set(encode(make(), questions).letter_ids) for kind, make in TOKENIZERS.items()}
    assert forms == {"bytes": {"none"}, "bpe": {"space", "none"}, "sentencepiece": {"space", "none"}}
    merging = byte_level_bpe([(":", letter) for letter in "ABCD"])  # `:A` is one token there
    assert set(encode(merging, questions).letter_ids) == {"space"}
    vocab = merging.get_vocab()
    assert encode(merging, questions).letter_ids["space"].tolist() == [[vocab[f"Ġ{x}"] for x in "ABCD"]] * len(ROWS)


@pytest.mark.parametrize(("liked", "form"), [("Ġ", "space"), ("", "none")])
def test_letters_are_read_in_the_form_to_which_the_model_gives_more_probability(
    liked: str, form: str, questions: Questions
) -> None:
    tokenizer, model = byte_level_bpe(), make_llama(vocab_size=320, tie_word_embeddings=False).eval()
    wanted = [tokenizer.get_vocab()[f"{liked}{letter}"] for letter in "ABCD"]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(320))
    with torch.no_grad():
        head.bias[wanted] = 4.0
    found = evaluate(model, encode(tokenizer, questions))
    assert found.form == form
    assert set(found.masses) == {"space", "none"}
    other = next(each for each in found.masses if each != form)
    assert found.masses[found.form] > 10 * found.masses[other]
    masses = found.as_json()["masses"]
    assert masses == {"space": found.masses["space"], "none": found.masses["none"]}
    words = {"space": "with a space before them", "none": "without a space before them"}[form]
    assert f"letters are read {words}" in list(found.lines())[1]


def test_a_form_that_cannot_be_used_is_told_as_such(base: Path, questions: Questions) -> None:
    found = evaluate(adapted(base)[0], encode(make_tokenizer(), questions))
    assert found.as_json()["masses"] == {"space": None, "none": found.masses["none"]}
    assert list(found.lines())[1].endswith("with a space before them they are not single tokens")


def test_a_form_is_used_only_where_it_fits_the_end_of_every_prompt(tmp_path: Path) -> None:
    rows = [row(0), row(1, input="One?\nAnswer:\n"), row(2, input="Two?\nAnswer: ")]
    encoded = encode(byte_level_bpe(), read_questions(str(write_jsonl(tmp_path / "r.jsonl", rows))))
    vocab = byte_level_bpe().get_vocab()
    assert {form: ids.tolist() for form, ids in encoded.letter_ids.items()} == {
        "space": [[vocab[f"Ġ{x}"] for x in "ABCD"]] * 3
    }, "a letter directly behind the third prompt would take its space into its token"


def test_a_letter_may_be_another_token_behind_prompts_that_end_differently(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "One?", "Answer", "##:", *"ABCD", *(f"##{x}" for x in "ABCD")]
    pieces_of_words = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    pieces_of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rows = [row(0, input="One?\nAnswer:"), row(1, input="One?\nAnswer:\n"), row(2, input="One?\nOne?\nAnswer:")]
    read = read_questions(str(write_jsonl(tmp_path / "r.jsonl", rows)))
    inside, alone = [10, 11, 12, 13], [6, 7, 8, 9]
    found = {form: ids.tolist() for form, ids in encode(wrap(pieces_of_words), read).letter_ids.items()}
    assert found == {"space": [alone] * 3, "none": [inside, alone, inside]}


def test_bos_stands_before_a_prompt_once_where_the_tokenizer_has_the_habit(tmp_path: Path) -> None:
    rows = [row(0, input="One?\nAnswer:"), row(1, input="<s>One?\nAnswer:")]
    read = read_questions(str(write_jsonl(tmp_path / "r.jsonl", rows)))
    tokenizer = sentencepiece_like()
    plain, written = (ids.tolist() for ids in encode(tokenizer, read).ids)
    assert [plain[0], plain.count(1), written[0], written.count(1)] == [1, 1, 1, 1]
    assert plain[1:] == tokenizer("One?\nAnswer:", add_special_tokens=False).input_ids
    assert 1 not in encode(byte_level_bpe(), read).ids[0]


def test_a_letter_that_is_several_tokens_in_both_forms_is_one_error_that_names_it(
    questions: Questions, tmp_path: Path
) -> None:
    merging = byte_level_bpe([(":", letter) for letter in "ABCD"])
    ten = read_questions(str(write_jsonl(tmp_path / "ten.jsonl", [*ROWS, row(0, output="F")])))
    with pytest.raises(DataError) as caught:  # ` E` and ` F` are two tokens there, and `:E` too
        encode(byte_level_bpe([(":", letter) for letter in "BD"]), ten)
    said = str(caught.value)
    assert "not single tokens of their own" in said
    assert "with a space before them (E, F) nor without a space before them (B, D)" in said
    assert "`Answer:`" in said
    assert "ten.jsonl:" in said
    assert set(encode(merging, questions).letter_ids) == {"space"}


def test_a_letter_that_changes_the_tokens_before_it_is_none(questions: Questions) -> None:
    beside = [(":", letter) for letter in "ABCD"]
    tokenizer = byte_level_bpe([*beside, ("e", "r"), ("er", ":")])
    alone, with_letter = (tokenizer.tokenize(text)[-2:] for text in ("Answer:", "Answer:A"))
    assert [alone, with_letter] == [["w", "er:"], ["er", ":A"]], "one token more, and yet not one behind the prompt"
    assert set(encode(tokenizer, questions).letter_ids) == {"space"}


@pytest.mark.parametrize(("known", "told", "named"), [("ABC", "<unk>", "D"), ("AB", None, "C, D")])
def test_letters_that_the_tokenizer_does_not_know_or_tell_apart_are_an_error(
    known: str, told: str | None, named: str, questions: Questions
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "Answer", ":", *known]
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=rf"with a space before them \({named}\) nor without a space .* \({named}\)"):
        encode(PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token=told), questions)


def test_letters_go_on_from_d_to_the_highest_that_is_right_somewhere(tmp_path: Path, base: Path) -> None:
    few = read_questions(str(write_jsonl(tmp_path / "few.jsonl", [row(0, output="B")])))
    more = read_questions(str(write_jsonl(tmp_path / "more.jsonl", [row(0, output="G"), row(1, output="A")])))
    assert [few.letters, more.letters] == ["ABCD", "ABCDEFG"]
    found = evaluate(adapted(base)[0], encode(make_tokenizer(), more))
    assert list(found.outcomes[0].log_probabilities) == list("ABCDEFG")
    assert found.as_json()["letters"] == "ABCDEFG"


def test_a_json_array_is_read_as_its_lines_are(tmp_path: Path, questions: Questions) -> None:
    path = tmp_path / "mmlu.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    read = read_questions(str(path))
    assert [(each.prompt, each.wanted, each.subject) for each in read.rows] == [
        (each.prompt, each.wanted, each.subject) for each in questions.rows
    ]
    assert read.rows[0].prompt == ROWS[0]["input"]
    assert read.rows[3].where == f"{path}:4"


def test_all_bad_rows_are_named_at_once_with_file_and_line(tmp_path: Path) -> None:
    bad = [
        {key: ROWS[0][key] for key in ("output", "subject")},
        row(1, output="Paris"),
        row(2, output="a"),
        row(3, output=2),
        row(4, input=" \n"),
        row(5, subject=""),
        row(7, output="Ä"),
        row(8, output="AB"),
        row(9, output=""),
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], *bad])
    with path.open("a", encoding="utf-8") as file:
        file.write("{not json\n")
    with pytest.raises(DataError) as caught:
        read_questions(str(path))
    problems = caught.value.problems
    assert [each.where for each in problems] == [f"{path}:{line}" for line in range(2, 12)]
    assert [each.what for each in problems[:9]] == [
        "field `input` is missing (the row has: `output`, `subject`)",
        "field `output` must be one capital letter, but is `Paris`",
        "field `output` must be one capital letter, but is `a`",
        "field `output` must be text, but is a number",
        "field `input` is empty: there is no question",
        "field `subject` is empty",
        "field `output` must be one capital letter, but is `Ä`",
        "field `output` must be one capital letter, but is `AB`",
        "field `output` must be one capital letter, but is ``",
    ]
    assert "not JSON" in problems[9].what
    assert all('"output": "A"' in each.fix for each in problems[:9])


@pytest.mark.parametrize(("name", "text"), [("none.jsonl", ""), ("none.json", "[]")])
def test_a_file_without_rows_is_an_error(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="has no rows"):
        read_questions(str(tmp_path / name))


def test_prompts_that_do_not_fit_are_named_and_never_cut(tmp_path: Path) -> None:
    rows = [row(0, input="x" * length + "\nAnswer:") for length in (92, 93, 91, 500)]
    read = read_questions(str(write_jsonl(tmp_path / "long.jsonl", rows)))
    with pytest.raises(DataError) as caught:
        encode(make_tokenizer(), read, 100)
    assert [each.where.rsplit(":", 1)[1] for each in caught.value.problems] == ["2", "4"]
    assert caught.value.problems[1].what == "the prompt has 508 tokens, and 100 fit"
    assert [len(ids) for ids in encode(make_tokenizer(), read, 508).ids] == [100, 101, 99, 508]


def test_a_prompt_as_long_as_the_model_has_positions_is_evaluated(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=50, n_embd=32, n_layer=1, n_head=2)).eval()
    rows = [row(0, input="x" * 42 + "\nAnswer:"), row(1, input="Answer:")]
    encoded = encode(make_tokenizer(), read_questions(str(write_jsonl(tmp_path / "r.jsonl", rows))), 50)
    found = evaluate(model, encoded)
    expected = [twin(model, "bytes", each["input"], "") for each in rows]
    for outcome, chances in zip(found.outcomes, expected, strict=True):
        assert [math.exp(value) for value in outcome.log_probabilities.values()] == pytest.approx(chances, rel=1e-4)


def test_the_training_engine_changes_no_choice(base: Path, questions: Questions) -> None:
    model, layers = adapted(base)
    encoded = encode(byte_level_bpe(), questions)
    before = evaluate(model, encoded)
    build_engine(model, list(layers.values()), compiled=False)
    after = evaluate(model.train(), encoded)
    assert [each.chosen for each in after.outcomes] == [each.chosen for each in before.outcomes]
    assert after.masses == pytest.approx(before.masses, rel=1e-4)


def test_letters_that_are_equally_likely_are_counted(questions: Questions) -> None:
    model, tokenizer = make_llama(tie_word_embeddings=False), make_tokenizer()
    encoded = encode(tokenizer, questions)
    assert evaluate(model, encoded).as_json()["tied"] == 0
    b, c = (tokenizer.get_vocab()[letter] for letter in "BC")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(320))
    with torch.no_grad():
        head.weight[c] = head.weight[b]
        head.bias[[b, c]] = 9.0
    found = evaluate(model, encoded)
    assert {each.chosen for each in found.outcomes} == {"B"}
    assert found.as_json()["tied"] == 18
    assert list(found.lines())[2] == (
        "chosen: A 0, B 18, C 0, D 0; in 18 rows as the first of letters that are equally likely"
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_drops_nothing_out(training: bool, base: Path, questions: Questions) -> None:
    model, encoded = adapted(base, dropout=0.5)[0].train(training), encode(make_tokenizer(), questions)
    assert evaluate(model, encoded).outcomes == evaluate(model, encoded).outcomes
    assert model.training is training


def test_logits_that_are_no_numbers_are_an_error_that_names_a_row_and_the_mode_is_restored(
    questions: Questions,
) -> None:
    model = make_llama().train()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match=rf"{questions.file}:1: .* behind 18 of 18 prompts"):
        evaluate(model, encode(make_tokenizer(), questions))
    assert model.training is True


def test_the_shares_of_two_processes_add_up_to_the_whole(base: Path, questions: Questions) -> None:
    model, encoded = adapted(base)[0], encode(make_tokenizer(), questions)
    whole = letter_log_probabilities(model, encoded, 4, Ranks(CPU))["none"]
    parts = []
    for rank in range(2):
        ranks = Ranks(CPU)
        ranks.rank, ranks.count = rank, 2  # accelerate knows of one process, so that its sum is this one's share
        parts.append(letter_log_probabilities(model, encoded, 4, ranks)["none"])
    assert [int((part != 0).all(1).sum()) for part in parts] == [10, 8]
    assert torch.equal(parts[0] + parts[1], whole)


def tallies(*counts: tuple[int, int]) -> list[Tally]:
    return [Tally(f"s{i}", right, rows) for i, (right, rows) in enumerate(counts)]


def test_accuracies_are_counts_of_the_outcomes_with_wilson_intervals(base: Path, questions: Questions) -> None:
    found = evaluate(adapted(base)[0], encode(make_tokenizer(), questions))
    right = sum(each.right for each in found.outcomes)
    assert (found.whole.right, found.whole.rows) == (right, 18)
    assert (found.whole.low, found.whole.high) == wilson(right, 18)
    assert [each.name for each in found.subjects] == ["art", "law", "zoology"]
    assert [each.rows for each in found.subjects] == [6, 10, 2]
    for each in found.subjects:
        assert each.right == sum(outcome.right for outcome in found.outcomes if outcome.subject == each.name)
        assert (each.low, each.high) == wilson(each.right, each.rows)
    mean = sum(each.accuracy for each in found.subjects) / 3
    assert found.mean_of_subjects.mean == pytest.approx(mean)
    assert found.loss == pytest.approx(-np.mean([each.log_probabilities[each.wanted] for each in found.outcomes]))


def test_subjects_count_the_same_however_many_rows_they_have() -> None:
    found = mean_over_subjects(tallies((90, 100), (1, 10)))
    assert found.mean == pytest.approx(0.5)
    assert found.high < 91 / 110, "the mean over rows is another number"
    assert mean_over_subjects(tallies((5, 5), (0, 3))) == Interval(0.5, 0.5, 0.5)


def test_the_interval_over_subjects_is_that_of_a_bootstrap_over_rows_written_out() -> None:
    counts = [(9, 12), (3, 20), (4, 7)]
    outcomes = [np.array([1.0] * right + [0.0] * (rows - right)) for right, rows in counts]
    generator = np.random.default_rng(11)
    means = [np.mean([generator.choice(each, len(each)).mean() for each in outcomes]) for _ in range(4000)]
    found = mean_over_subjects(tallies(*counts))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.012)
    assert found == mean_over_subjects(tallies(*counts))
    assert found != mean_over_subjects(tallies(*counts), seed=1)


def test_about_95_of_100_intervals_over_subjects_hold_the_true_mean() -> None:
    shares, rows = np.array([0.3, 0.5, 0.7, 0.8]), np.array([40, 20, 30, 100])
    drawn = np.random.default_rng(2).binomial(rows, shares, (300, 4))
    held = 0
    for rights in drawn:
        found = mean_over_subjects(tallies(*zip(map(int, rights), map(int, rows), strict=True)), resamples=1000)
        held += found.low <= shares.mean() <= found.high
    assert 270 <= held <= 297


def test_the_json_holds_what_the_result_says(base: Path, questions: Questions) -> None:
    found = evaluate(adapted(base)[0], encode(make_tokenizer(), questions))
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (told["file"], told["rows"], told["right"]) == (questions.file, 18, found.whole.right)
    assert (told["accuracy"], told["low"], told["high"]) == (found.whole.accuracy, found.whole.low, found.whole.high)
    mean = found.mean_of_subjects
    assert [told[f"mean_of_subjects{end}"] for end in ("", "_low", "_high")] == [mean.mean, mean.low, mean.high]
    assert told["subjects"] == [each.as_json() for each in found.subjects]
    assert set(told["subjects"][0]) == {"name", "right", "rows", "accuracy", "low", "high"}
    assert told["chosen"] == {x: Counter(each.chosen for each in found.outcomes)[x] for x in "ABCD"}
    assert told["wanted"] == {x: Counter(each["output"] for each in ROWS)[x] for x in "ABCD"}
    single = json.loads(json.dumps(found.outcomes[0].as_json(), allow_nan=False))
    assert list(single) == ["where", "subject", "wanted", "chosen", "right", "log_probabilities"]
    assert single["log_probabilities"] == found.outcomes[0].log_probabilities


def test_the_text_tells_both_means_and_every_subject(base: Path, tmp_path: Path) -> None:
    model = adapted(base)[0]
    rows = [row(0, subject="a\x1b[2Jb", output="A"), row(1, subject="law"), row(2, subject="law")]
    found = evaluate(model, encode(make_tokenizer(), read_questions(str(write_jsonl(tmp_path / "r.jsonl", rows)))))
    lines = list(found.lines())
    assert lines[0].startswith(f"{tmp_path}/r.jsonl: {100 * found.whole.accuracy:.1f}% (")
    assert f"of 3 rows right; mean of 2 subjects {100 * found.mean_of_subjects.mean:.1f}% (" in lines[0]
    assert [line.split()[0] for line in lines[3:]] == ["a?[2Jb", "law"]
    assert f"{found.subjects[1].right} of     2" in lines[4]
    alone = read_questions(str(write_jsonl(tmp_path / "one.jsonl", rows[:1])))
    only = list(evaluate(model, encode(make_tokenizer(), alone)).lines())
    assert (len(only), only[0].endswith("of 1 row right")) == (3, True)
