"""The embeddings of an adapter's new tokens, put among those of its base.

Knows tensors and the names of files. Invariant: every tensor of the files that becomes the embedding or the head gets
its rows, and all others of its rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.errors import ModelError, Problem
from qlora_cli.export.weights import BaseWeights
from qlora_cli.model.adapter import PREFIX, TOKEN_ROWS, mismatches
from qlora_cli.model.tokens import check_ids, token_layers


@dataclass(frozen=True)
class NewRows:
    """Rows `values` [n, hidden] of `ids` [n], rising, for a tensor that has `size` rows with them."""

    ids: Tensor
    values: Tensor
    size: int

    def among(self, pieces: Iterable[Tensor], values: Tensor) -> Iterator[Tensor]:
        """The base's rows, in `pieces`, with `values` (these rows in the pieces' type) in their places and behind."""
        start = 0
        for piece in pieces:
            here = (self.ids >= start) & (self.ids < start + len(piece))
            yield piece.index_copy(0, self.ids[here] - start, values[here])
            start += len(piece)
        if start < self.size:
            yield values[self.ids >= start]


def new_rows(
    weights: BaseWeights, ids: Sequence[int], tensors: Mapping[str, Tensor], where: Path
) -> dict[str, NewRows]:
    """The rows of an adapter's new tokens by the name of the tensor in the base's files; none where it has no `ids`.
    Raises `ModelError` naming every tensor that lacks, fits no layer, or has another shape."""
    layers = token_layers(weights.model) if ids else None
    hidden = weights.model.get_input_embeddings().embedding_dim
    keys = {name: f"{PREFIX}{name}{TOKEN_ROWS}" for name in layers.names} if layers else {}
    problems = mismatches({key: (len(ids), hidden) for key in keys.values()}, tensors)
    if problems:
        raise ModelError.of([Problem(text, where=str(where)) for text in problems])
    if layers is None:
        return {}
    size = check_ids(ids, weights.model.get_input_embeddings().num_embeddings)
    keys.setdefault(layers.head, keys[layers.embedding])
    return {
        file: NewRows(torch.tensor(ids), tensors[key].float(), size)
        for layer, key in keys.items()
        for file in weights.named(f"{layer}.weight")
    }
