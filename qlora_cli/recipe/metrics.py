"""The metrics of generated answers, by name.

Knows words. Invariant: what is accepted here is what `evaluation/matching.py` can compute.
"""

from __future__ import annotations

import re

PLAIN_METRICS = ("exact", "contains", "json")
REGEX = "regex:"
"""What a metric begins with that is a regular expression, to be found anywhere in the answer."""


def metric_problem(metric: str) -> str:
    """What is wrong with a metric; empty where nothing is."""
    if metric in PLAIN_METRICS:
        return ""
    pattern = metric.removeprefix(REGEX)
    if pattern in ("", metric):
        return f"must be {', '.join(PLAIN_METRICS)} or {REGEX}PATTERN (got {metric!r})"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error} (got {pattern!r})"
    return ""
