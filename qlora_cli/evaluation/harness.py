"""Tasks of lm-evaluation-harness (the extra `lm-eval`) on a model that is loaded already.

Knows lm_eval's wrapper of transformers models and its evaluator; nothing of recipes. Invariant: the
model, the tokenizer and this process are afterwards as they were, and what lm_eval warned of stands in the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import DataError, NonFiniteError
from qlora_cli.evaluation.harness_tasks import SEED, Tasks, failures
from qlora_cli.evaluation.undisturbed import Hushed, Remarks, only_read, same_surroundings, seeded

RESAMPLES = 1_000
"""Of the bootstrap, for metrics whose standard error has no formula."""
Tell = Callable[[int, int], None]
"""Takes how many requests are answered, of how many of their kind."""


@dataclass(frozen=True)
class Harness:
    """How tasks are run: sequences at once, the longest one in tokens, at most how many rows of each task, and whether
    prompts go through the tokenizer's chat template."""

    batch_size: int
    max_length: int
    limit: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class Score:
    """A metric and its standard error, where it has one. A filter that is not lm_eval's `none` follows a comma."""

    metric: str
    value: float
    error: float | None

    def line(self) -> str:
        """One line of text."""
        return f"{self.metric} {self.value:.4f}" + ("" if self.error is None else f" (standard error {self.error:.4f})")


@dataclass(frozen=True)
class TaskScores:
    """What a task, or a group of tasks, came to."""

    task: str
    samples: int
    shots: int | None
    scores: tuple[Score, ...]

    def line(self) -> str:
        """One line of text."""
        shots = "" if self.shots is None else f", {self.shots}-shot"
        return f"{self.task}: {'; '.join(score.line() for score in self.scores)} over {self.samples:,} rows{shots}"

    def as_json(self) -> dict[str, Any]:
        """Plain values; None for a number that is not finite, and for a standard error that there is not."""
        values = dict[str, float | None]()
        for score in self.scores:
            values[score.metric] = _finite(score.value)
            values[_stderr_name(score.metric)] = _finite(score.error)
        return values | {"samples": self.samples}


@dataclass(frozen=True)
class HarnessResult:
    """The scores of every task and group, how they were computed, and what lm_eval had to say about it."""

    tasks: tuple[TaskScores, ...]
    how: Harness
    version: str
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """A line for each task, one for how they were run, and one for each remark."""
        template = "with the chat template" if self.how.chat_template else "without chat template"
        limit = "" if self.how.limit is None else f", at most {self.how.limit:,} rows of each task"
        head = f"lm-eval {self.version}, {template}, at most {self.how.max_length:,} tokens{limit}"
        return [head, *(task.line() for task in self.tasks), *(f"note: lm-eval: {text}" for text in self.remarks)]

    def as_json(self) -> dict[str, Any]:
        """Metrics by task."""
        return {task.task: task.as_json() for task in self.tasks}

    def setting_json(self) -> dict[str, Any]:
        """What the metrics depend on beside model and tasks, and the remarks."""
        how = self.how
        shots = {task.task: task.shots for task in self.tasks}
        setting = {"version": self.version, "chat_template": how.chat_template, "max_length": how.max_length}
        return setting | {"limit": how.limit, "shots": shots, "remarks": list(self.remarks)}


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, how: Harness, tell: Tell | None = None) -> HarnessResult:
    """Runs `tasks` on a transformers model, where and as it is. The same call gives the same figures. Raises
    `NonFiniteError` where the model's logits are, `DataError` where a task fails."""
    if how.chat_template and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", fix="run the tasks without one")
    from lm_eval import __version__, evaluate

    hushed, remarks = Hushed(), Remarks("lm_eval")
    with ExitStack() as stack:
        for context in (only_read(model, _check_output), same_surroundings(DISABLE_MULTIPROC="1"), hushed):
            stack.enter_context(context)
        stack.enter_context(seeded(SEED, model.device))
        stack.enter_context(failures(", ".join(tasks.names), "run"))
        wrapped = _wrap(model, copy.deepcopy(tokenizer), how)  # a copy, since it may get a padding token
        if tell is not None:
            _Told(tell, hushed).watch(wrapped)
        stack.enter_context(remarks.collected())
        options = {"apply_chat_template": how.chat_template, "fewshot_as_multiturn": how.chat_template}
        found = evaluate(
            wrapped, tasks.loaded, limit=how.limit, bootstrap_iters=RESAMPLES, log_samples=False, **options
        )
    scores = tuple(_scores(name, values, found) for name, values in found["results"].items())
    told = dict.fromkeys([*tasks.remarks, *remarks.texts()])
    if empty := [each.task for each in scores if not each.scores and each.task in tasks.loaded["tasks"]]:
        raise DataError(
            f"lm-eval has no metric for {', '.join(empty)}",
            why="; ".join(told),
            fix="name one that it has under metric_list of the task",
        )
    return HarnessResult(tuple(each for each in scores if each.scores), how, __version__, tuple(told))


def _wrap(model: Any, tokenizer: Any, how: Harness) -> Any:
    from lm_eval.models.huggingface import HFLM

    with Remarks("lm_eval").collected():  # to nowhere: that the model is loaded already
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=how.batch_size, max_length=how.max_length)


def _check_output(output: Any) -> None:
    if not bool(output.logits.amax(-1).isfinite().all()):
        raise NonFiniteError(
            "the model's logits are not finite numbers",
            why="every figure from them would be noise",
            fix="check the weights; if they are good, compute in a wider type: quantization.compute_dtype float32",
        )


@dataclass
class _Told:
    """Counts the sequences that the model has answered."""

    tell: Tell
    hushed: Hushed
    done: int = 0
    total: int = 0

    def watch(self, wrapped: Any) -> None:
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(wrapped, name, self._beginning(getattr(wrapped, name)))
        for name in ("_model_call", "_model_generate"):
            setattr(wrapped, name, self._counting(getattr(wrapped, name)))

    def _beginning(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        def begin(requests: Sequence[Any], **options: Any) -> Any:
            self.done, self.total = 0, len(requests)
            answers = answer(requests, **options)
            self._say(self.total)  # equal prompts are computed once, long ones in several pieces
            return answers

        return begin

    def _counting(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def count(*inputs: Any, **options: Any) -> Any:
            answers = compute(*inputs, **options)
            self._say(min(self.done + len(answers), self.total))
            return answers

        return count

    def _say(self, done: int) -> None:
        if done > self.done:
            self.done = done
            with self.hushed.lifted():
                self.tell(done, self.total)


def _scores(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> TaskScores:
    """lm_eval's names are `metric,filter` and `metric_stderr,filter`."""
    numbers = {key: float(value) for key, value in values.items() if "," in key and _is_number(value)}
    keys = [tuple(key.rsplit(",", 1)) for key in values if "," in key]
    plain = [(metric, chosen) for metric, chosen in keys if not metric.endswith("_stderr")]
    scores = tuple(
        Score(
            metric if chosen == "none" else f"{metric},{chosen}",
            numbers[f"{metric},{chosen}"],
            numbers.get(f"{metric}_stderr,{chosen}"),
        )
        for metric, chosen in plain
        if f"{metric},{chosen}" in numbers
    )
    return TaskScores(name, int(values.get("sample_len", 0)), found["n-shot"].get(name), scores)


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__float__")


def _stderr_name(metric: str) -> str:
    name, comma, chosen = metric.partition(",")
    return f"{name}_stderr{comma}{chosen}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
