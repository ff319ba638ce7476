"""How sure a share of right answers is, and whether two models differ in theirs.

Knows counts, nothing of models or rows. Invariant: no random numbers and no approximation that fails at the ends: a
share of 0 or 1 has an interval with a width, and any counts have a p-value.
"""

from __future__ import annotations

import math

NORMAL_95 = 1.959963984540054
_NEGLIGIBLE = 1e-18
"""Of the sum of a tail: a term below it, and all that follow, change nothing."""


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95% score interval of the share `right / rows` (Wilson 1927, "Probable inference, the law of succession, and
    statistical inference", Journal of the American Statistical Association 22). Of no rows at all: (0, 1)."""
    assert 0 <= right <= rows, f"{right} right of {rows}"
    if rows == 0:
        return 0.0, 1.0
    share, z2 = right / rows, NORMAL_95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if right == 0 else low), (1.0 if right == rows else high)  # exactly so, but for rounding


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947, "Note on the sampling error of the difference between
    correlated proportions or percentages", Psychometrika 12): how likely two models that are equally good divide the
    rows that only one of them has right at least as unevenly. 1 where there are none; 0 where it is below 1e-308."""
    assert only_first >= 0 and only_second >= 0, f"counts {only_first} and {only_second}"
    rows, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    # Each row is a fair coin: P = 2 sum_{k <= fewer} C(rows, k) / 2^rows, summed relative to its last and largest term.
    largest = math.lgamma(rows + 1) - math.lgamma(fewer + 1) - math.lgamma(rows - fewer + 1) - rows * math.log(2)
    term = total = 1.0
    for k in range(fewer, 0, -1):
        term *= k / (rows - k + 1)
        total += term
        if term < _NEGLIGIBLE * total:
            break
    return min(1.0, 2 * total * math.exp(largest))
