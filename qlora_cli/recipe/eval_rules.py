"""Rules about held-out rows and what is measured on them.

Knows a valid `Recipe` only. Invariant: as in `rules.py`, which runs them.
"""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.recipe.clash import Clash, Rule
from qlora_cli.recipe.metrics import metric_problem
from qlora_cli.recipe.scalars import written
from qlora_cli.recipe.schema import Recipe


def _two_held_out(recipe: Recipe) -> Iterator[Clash]:
    data = recipe.data
    if data.eval is not None and data.eval_split is not None:
        what = f"only one of data.eval and data.eval_split may be set (got {written(data.eval_split)})"
        fix = "keep one, e.g. --set data.eval_split=null"
        yield Clash(("data.eval_split", "data.eval"), what, "there is one set of held-out rows", fix)


def _nothing_held_out(recipe: Recipe) -> Iterator[Clash]:
    if recipe.data.eval is not None or recipe.data.eval_split is not None:
        return
    asked = (("every", None), ("keep_best", False), ("patience", None), ("metrics", ()), ("samples", ()))
    for name, idle in (*asked, ("choices", None)):
        value = getattr(recipe.eval, name)
        if value != idle:
            what = f"needs held-out rows, but data.eval and data.eval_split are not set (got {written(value)})"
            fix = f"e.g. --set data.eval_split=0.05, or --set eval.{name}={written(idle)}"
            yield Clash((f"eval.{name}", "data.eval", "data.eval_split"), what, "there is nothing to evaluate on", fix)


def _single_evaluation(recipe: Recipe) -> Iterator[Clash]:
    if recipe.eval.every is not None:
        return
    for name, idle in (("keep_best", False), ("patience", None)):
        value = getattr(recipe.eval, name)
        if value != idle:
            what = f"needs eval.every, the steps between evaluations (got {written(value)})"
            why = "without it there is one evaluation, at the end, and nothing to compare it with"
            fix = f"e.g. --set eval.every=100, or --set eval.{name}={written(idle)}"
            yield Clash((f"eval.{name}", "eval.every"), what, why, fix)


def _broken_pattern(recipe: Recipe) -> Iterator[Clash]:
    for what in filter(None, map(metric_problem, recipe.eval.metrics)):
        yield Clash(("eval.metrics",), what, "Python's re module has to understand it", "mend or remove it")


EVAL_RULES: tuple[Rule, ...] = (_two_held_out, _nothing_held_out, _single_evaluation, _broken_pattern)
