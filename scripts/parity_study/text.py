"""The prose of docs/parity.md.

Knows no figure: those come in by name. Invariant: a line of the document is no longer than its width, but for tables.
"""

from __future__ import annotations

import textwrap

WIDTH = 120
HEAD = """# Parity at tiny scale

Made by `scripts/parity.py`; do not edit. Every figure and every verdict below is computed from the results.

## What was asked

The QLoRA paper (Dettmers et al. 2023, arXiv:2305.14314) claims that 4-bit adapters match 16-bit LoRA and full
fine-tuning, that NF4 is better than FP4, that double quantization (DQ) costs nothing, that adapters belong on all
linear layers, and that the rank matters little. Here the same is asked of the demo's base, a Llama of 3.5 million
parameters, and reported as it came out. Which comparisons test which claim is settled in
`scripts/parity_study/design.py`, and was so before the first result.

## How it was run
"""
METHOD = """{date}; {cores} cores of {processor}; Python {python}, {versions}. {runs} runs and {swept} of the sweep
took {minutes} minutes, of which {worked} computing, in {workers} processes of one thread each. A second start of the
command runs only what is missing.

Each run is `recipes/tiny-demo.yaml` with {shorter} or {longer} steps of 16 rows, alpha 32 at every rank, and products
in bfloat16.
The model learns to turn notes into JSON records of name, age and job. The demo's records have the town too. It was
left out: in trial runs, with other seeds, with and without 4 bits and at several rates, it was a draw whether the
model found the town within a hundred steps or had every other field right and no town, and that draw would have
hidden all that is asked here.

There are two lengths because how fast a configuration learns and where it ends are two questions, and {shorter} steps
answer mostly the first. {shorter} was chosen in trial runs of one configuration, so that exact match was neither 0 nor
100%; {longer} is {times} times that, where most runs are expected to have learned the task. The second length was added
after the results at {shorter} steps had been seen, and fixed before any at {longer} were. A longer run is not a shorter
one continued: each length has its own learning rates, and its own cosine schedule from warmup to the end.

{heldout} notes are held out; no name in them is in a training row. Loss is the mean over the tokens of the answers;
exact match is the share of greedy answers that are the wanted text to the letter, as in `scripts/demo.py`. The seeds
are {seeds}. Intervals are 95% t intervals over seeds; where seeds differ much, they may pass 0 or 100%.
"""
SWEEP = """Chosen for each length by held-out loss with seed {seed}, on held-out rows that are not those of the study,
with {storage} of rank {rank} or full fine-tuning. Every storage and rank then has the rate of its kind at that length.
The lowest rate of each kind was put into the sweep with the second length.
"""
UNTRAINED = """What storing the base does to it: the loss of the answers in {chats} held-out chats of the kind that it
was pretrained on, in float32, as a mean over chats; the rise over 16 bits with its 95% t interval over chats.
"""
VERDICTS = """Differences are the first less the second, paired by seed: the same seed gives the same order of the
rows, and the same A where the adapters have the same shape. Only runs of one length are compared with one another; the
summary counts each length for itself. Loss is better when lower. That two are the same is
contradicted by an interval without 0; an interval that holds 0 is no contradiction, and no proof.
"""
LIMITS = """## What tiny scale cannot say

- One base, one task, a short training: the claims are about models a thousand times as large, and about benchmarks.
Neither a difference nor its absence carries over.
- Intervals are over seeds (order of the rows, A of the adapters), on the same rows and the same base: they say what
another seed would do, not another task. "No difference seen" is no proof that there is none; the interval says how
large it may be.
- Intervals are at 95% each and not corrected for their number: of twenty comparisons without any difference, one is
expected to seem to have one.
- A short training measures mostly speed: that is what the two lengths are for. A difference that is seen at the
shorter and not at the longer may be one of speed alone. The longer is short too: after {longest} steps no
configuration need be where a long training would end. The two lengths share seeds, rows and base; a verdict found at
both is not found twice independently.
- Alpha is the same for every rank, and the rate of each length was chosen at one rank, in 16 bits, with one seed.
- The base is small, and its embedding, which stays in 16 bits, a large part of it. What 4 bits do to a large model is
not seen here.
"""


def prose(text: str, **facts: object) -> str:
    """The text with its facts, each paragraph and each item of a list wrapped; a heading stays a line."""
    return "\n\n".join(_wrapped(part) for part in text.format(**facts).strip().split("\n\n")) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith("#"):
        return part
    items = part.replace("\n- ", "\n\n- ").split("\n\n")
    indents = ["  " if item.startswith("- ") else "" for item in items]
    return "\n".join(
        textwrap.fill(item, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        for item, indent in zip(items, indents, strict=True)
    )
