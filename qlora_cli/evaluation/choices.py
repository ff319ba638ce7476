"""Multiple choice as the QLoRA repository measures MMLU: the likeliest letter behind each prompt.

Knows a model and encoded questions; nothing of files, recipes or terminals. Invariant: letters are compared at the
prompt's own last position, whatever else is in the batch; whether they are read with a space before them or without is
measured on all rows together and told, and evaluating leaves the model in the mode that it had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_cli.data.batches import WIDTH_MULTIPLE, round_up
from qlora_cli.errors import NonFiniteError
from qlora_cli.evaluation.choice_rows import EncodedQuestions, Form, Question, Questions
from qlora_cli.evaluation.intervals import wilson
from qlora_cli.evaluation.paired import Interval
from qlora_cli.model.decode import evaluating
from qlora_cli.model.loss import target_logits
from qlora_cli.model.ranks import Ranks

RESAMPLES = 10_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """One question: the letter that is right, the one that the model finds likeliest (the first of equals), and the
    natural logarithm of each letter's probability among all tokens."""

    where: str
    subject: str
    wanted: str
    chosen: str
    log_probabilities: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether the model chose the letter that is right."""
        return self.chosen == self.wanted

    @property
    def tied(self) -> bool:
        """Whether another letter is as likely: logits of 16 bits are coarse, and the first of equals is a habit."""
        return list(self.log_probabilities.values()).count(self.log_probabilities[self.chosen]) > 1

    def as_json(self) -> dict[str, Any]:
        """Plain values; the logarithm of 0 is null."""
        logs = {letter: _number(value) for letter, value in self.log_probabilities.items()}
        known = {"where": self.where, "subject": self.subject, "wanted": self.wanted, "chosen": self.chosen}
        return {**known, "right": self.right, "log_probabilities": logs}


@dataclass(frozen=True)
class Tally:
    """Right answers among rows; `low` and `high` are the bounds of the 95% Wilson interval of their share."""

    name: str
    right: int
    rows: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.rows

    @property
    def low(self) -> float:
        """See above."""
        return wilson(self.right, self.rows)[0]

    @property
    def high(self) -> float:
        """See above."""
        return wilson(self.right, self.rows)[1]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        figures = {"accuracy": self.accuracy, "low": self.low, "high": self.high}
        return {"name": self.name, "right": self.right, "rows": self.rows, **figures}


@dataclass(frozen=True)
class ChoiceResult:
    """How a model chose. `form` is the one in which letters were read; `masses` is, for each form that could be used,
    the probability that its letters have together, in the mean over rows."""

    file: str
    letters: str
    form: Form
    masses: Mapping[Form, float]
    outcomes: tuple[Outcome, ...]
    whole: Tally
    subjects: tuple[Tally, ...]
    mean_of_subjects: Interval
    """Each subject counts the same, however many rows it has: what the QLoRA repository reports."""

    @property
    def loss(self) -> float:
        """Mean over rows of -log the probability of the right letter, in nats; infinite where that has none."""
        return -sum(each.log_probabilities[each.wanted] for each in self.outcomes) / len(self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the single rows."""
        mean, whole = self.mean_of_subjects, self.whole.as_json()
        return {
            "file": self.file,
            **{key: whole[key] for key in ("accuracy", "low", "high", "right", "rows")},
            "mean_of_subjects": mean.mean,
            "mean_of_subjects_low": mean.low,
            "mean_of_subjects_high": mean.high,
            "loss": _number(self.loss),
            "letters": self.letters,
            "form": self.form,
            "masses": {form: self.masses.get(form) for form in get_args(Form)},
            "chosen": self._counted([each.chosen for each in self.outcomes]),
            "wanted": self._counted([each.wanted for each in self.outcomes]),
            "tied": self._tied,
            "subjects": [each.as_json() for each in self.subjects],
        }

    @property
    def _tied(self) -> int:
        return sum(each.tied for each in self.outcomes)

    def _counted(self, letters: Sequence[str]) -> dict[str, int]:
        counts = Counter(letters)
        return {letter: counts[letter] for letter in self.letters}

    def lines(self) -> Iterator[str]:
        """Text: one line of accuracy, one of how letters were read, one of how often each was chosen; then one for each
        subject, where there are several."""
        mean, rows = self.mean_of_subjects, f"{self.whole.rows:,} rows" if self.whole.rows > 1 else "1 row"
        over = f"; mean of {len(self.subjects):,} subjects {_percents(mean.mean, mean.low, mean.high)}"
        yield f"{self.file}: {_line(self.whole)} of {rows} right{over if len(self.subjects) > 1 else ''}"
        yield self._read_as()
        counts = self._counted([each.chosen for each in self.outcomes])
        tied = f"; in {self._tied:,} rows as the first of letters that are equally likely" if self._tied else ""
        yield "chosen: " + ", ".join(f"{letter} {count:,}" for letter, count in counts.items()) + tied
        if len(self.subjects) > 1:
            names = [_printable(each.name) for each in self.subjects]
            width = max(map(len, names))
            for name, each in zip(names, self.subjects, strict=True):
                yield f"  {name:<{width}}  {each.right:>5,} of {each.rows:>5,}  {_line(each)}"

    def _read_as(self) -> str:
        words: dict[Form, str] = {"space": "with a space before them", "none": "without a space before them"}
        told = [f"{words[form]} they have {100 * mass:.3g}% of the probability" for form, mass in self.masses.items()]
        other = [f"{words[form]} they are not single tokens" for form in get_args(Form) if form not in self.masses]
        return f"letters are read {words[self.form]}: {', '.join(told + other)}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(tally: Tally) -> str:
    return _percents(tally.accuracy, tally.low, tally.high)


def _percents(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)


def evaluate_choices(model: Any, encoded: EncodedQuestions, batch_size: int, ranks: Ranks) -> ChoiceResult:
    """What `model` chooses, `batch_size` prompts at a time, shared among the processes; every process has the result.
    Of two forms that can be used, letters are read in the one to which the model gives more probability.

    `NonFiniteError` where logits are no numbers.
    """
    logs = {form: table.numpy() for form, table in letter_log_probabilities(model, encoded, batch_size, ranks).items()}
    masses = {form: float(np.exp(table).sum(1).mean()) for form, table in logs.items()}
    form = max(masses, key=lambda each: masses[each])
    _check_finite(logs[form], encoded.questions.rows)
    return _result(encoded.questions, form, masses, logs[form])


@torch.no_grad()
def letter_log_probabilities(
    model: Any, encoded: EncodedQuestions, batch_size: int, ranks: Ranks
) -> dict[Form, Tensor]:
    """For each usable form the natural logarithms of the letters' probabilities among all tokens: [rows, letters]
    float64 on the CPU, in the order of the questions."""
    forms = list(encoded.letter_ids)
    letters = torch.from_numpy(np.stack([encoded.letter_ids[form] for form in forms], 1))  # [rows, forms, letters]
    found = torch.zeros(letters.shape, dtype=torch.float64, device=ranks.device)
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded.ids[row]))  # memory runs out early or never
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluating(model):
        for _, batch in ranks.mine(batches):
            ids, attention, last = (each.to(ranks.device) for each in _padded(encoded, batch))
            with ranks.autocast():
                logits = target_logits(model, ids, attention, last)
            wanted = letters[batch].flatten(1).to(ranks.device)
            logs = logits.log_softmax(-1).gather(1, wanted)
            found[batch] = logs.double().view(len(batch), *letters.shape[1:])
    summed = ranks.sum(found).cpu()
    return {form: summed[:, i] for i, form in enumerate(forms)}


def _padded(encoded: EncodedQuestions, batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask, and True at each prompt's last position, [rows, T] each. Padding is at the right, where no
    position of a causal model sees it, whatever kind of layers it has."""
    lengths = [len(encoded.ids[row]) for row in batch]
    width = min(round_up(max(lengths), WIDTH_MULTIPLE), encoded.max_length)
    ids = torch.zeros((len(batch), width), dtype=torch.int64)
    for line, row in enumerate(batch):
        ids[line, : lengths[line]] = torch.from_numpy(encoded.ids[row])
    behind = torch.arange(width)[None] - torch.tensor(lengths)[:, None]
    return ids, (behind < 0).long(), behind == -1


def _check_finite(logs: Floats, rows: Sequence[Question]) -> None:
    """Every process has the same sums, so that all stop here or none does."""
    bad = np.flatnonzero(~np.isfinite(logs.max(1)))
    if len(bad):
        raise NonFiniteError(
            f"the model's logits are not finite numbers behind {len(bad):,} of {len(rows):,} prompts",
            why="a letter chosen by them would be noise",
            fix="check the weights (`qlora eval` measures them); if they are good, compute in a wider type: "
            "quantization.compute_dtype bfloat16 or float32",
            where=rows[bad[0]].where,
        )


def _result(questions: Questions, form: Form, masses: Mapping[Form, float], logs: Floats) -> ChoiceResult:
    outcomes = tuple(_outcome(row, questions.letters, each) for row, each in zip(questions.rows, logs, strict=True))
    rows, right = Counter(each.subject for each in outcomes), Counter(each.subject for each in outcomes if each.right)
    subjects = tuple(Tally(name, right[name], rows[name]) for name in sorted(rows))
    whole, mean = Tally(questions.file, right.total(), rows.total()), mean_over_subjects(subjects)
    return ChoiceResult(questions.file, questions.letters, form, masses, outcomes, whole, subjects, mean)


def _outcome(row: Question, letters: str, logs: Floats) -> Outcome:
    of_letters = dict(zip(letters, map(float, logs), strict=True))
    return Outcome(row.where, row.subject, row.wanted, letters[int(logs.argmax())], of_letters)


def mean_over_subjects(subjects: Sequence[Tally], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of the subjects' accuracies and the 95% interval of a bootstrap over rows within each subject (Efron and
    Tibshirani 1993, percentile method). Rows are right or wrong, so that the right ones among as many drawn with
    replacement are a binomial number. A subject that is all right or all wrong, as one of a single row is, varies not
    at all: with few rows per subject the interval is too narrow."""
    rows = np.array([each.rows for each in subjects])
    shares = np.array([each.accuracy for each in subjects])
    drawn = np.random.default_rng(seed).binomial(rows, shares, (resamples, len(subjects)))
    low, high = np.quantile((drawn / rows).mean(1), [0.025, 0.975])
    return Interval(float(shares.mean()), float(low), float(high))
