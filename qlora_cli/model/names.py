"""From the names of tensors in a model's files to the names of its parameters.

Knows transformers' renaming. Invariant: a tensor that becomes exactly one parameter has that parameter's name; one that
is combined with others, or that the model does not have, has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key


@dataclass(frozen=True)
class Names:
    """`parameters`: the parameter that each tensor alone becomes; `combined`: parameters made of several tensors."""

    parameters: dict[str, str]
    combined: frozenset[str]


def parameter_names(model: Any, names: Iterable[str]) -> Names:
    """What the tensors of its files become in `model`, which may lie on the meta device.

    The very functions that `from_pretrained` uses (transformers 5: renamings first, at most one conversion then, the
    base model's prefix last), so that old checkpoints (GPT-2 without `transformer.`) are read as loading reads them.
    """
    known = model.state_dict()
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    parameters, combined = dict[str, str](), set[str]()
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known and pattern is None:
            parameters[name] = renamed
        elif renamed in known:
            combined.add(renamed)
    return Names(parameters, frozenset(combined))
