"""Embeddings of new tokens: a few trained rows of a vocabulary that is frozen.

Knows a model's embedding and its head; nothing of LoRA and of files. Invariant: only those rows have a gradient, and
every other row keeps its bits. Where head and embedding share a weight, one row serves both.

With E the frozen embedding, R the trained rows [n, hidden] of ids i_1 ... i_n, and for a head of its own its rows H:

    embedding(t) = R_k if t = i_k, else E_t          logit_t(h) = H_k h if t = i_k, else the frozen head's

A row begins as the mean of all rows that the base has (Hewitt 2021, "Initializing new word embeddings for pretrained
language models"), so that no new token is likelier at first than an average one; a row that the base has to spare
begins so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as looked_up
from torch.nn.functional import linear

from qlora_cli.errors import ModelError

NAME = "token_rows"
"""Under which a model holds the rows that are in use."""
AT_ONCE = 8192
"""Rows summed at once for their mean."""


@dataclass(frozen=True)
class TokenLayers:
    """Names of a model's embedding and head; `tied`: the head multiplies with the embedding's own weight."""

    embedding: str
    head: str
    tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that have rows of their own."""
        return (self.embedding,) if self.tied else (self.embedding, self.head)


def token_layers(model: Any) -> TokenLayers:
    """Those of `model`, which may lie on the meta device. Raises `ModelError` where new tokens cannot be trained, in a
    way that PEFT computes too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if reason := _unfit(embedding, head) or _odd_tie(model, embedding.weight, head.weight):
        raise _refusal(reason)
    names = {id(module): name for name, module in model.named_modules()}
    return TokenLayers(names[id(embedding)], names[id(head)], head.weight is embedding.weight)


def _unfit(embedding: Any, head: Any) -> str:
    if not isinstance(embedding, nn.Embedding):
        return f"its embedding is a {type(embedding).__name__}"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its head is no plain linear layer but {'missing' if head is None else type(head).__name__}"
    if head.bias is not None:
        return "its head has a bias"
    rows, columns = len(embedding.weight), len(head.weight)
    return "" if rows == columns else f"its embedding has {rows} rows and its head {columns}"


def _odd_tie(model: Any, embedding: Tensor, head: Tensor) -> str:
    """PEFT believes the configuration; and a weight may have no third user."""
    tied = head is embedding
    if tied != bool(model.config.to_dict().get("tie_word_embeddings")):
        return f"its head and embedding {'share' if tied else 'do not share'} a weight, against its configuration"
    users = [name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding or p is head]
    return "" if len(users) == 2 else f"{' and '.join(users)} are one weight"


def _refusal(reason: str) -> ModelError:
    return ModelError(
        f"embeddings of new tokens cannot be trained with this model: {reason}",
        why="only rows of a plain embedding and a plain head can be trained, saved, and loaded by PEFT",
        fix="choose a data.template whose tokens the tokenizer has, and leave data.new_tokens out",
    )


def check_ids(ids: Sequence[int], size: int) -> int:
    """How many rows an embedding of `size` rows must have for `ids`. `ModelError` where one would have no token."""
    assert ids, "there are new tokens"
    assert list(ids) == sorted(set(ids)), f"ids are not in order: {ids}"
    beyond = [i for i in ids if i >= size]
    if ids[0] < 0 or beyond != list(range(size, size + len(beyond))):
        raise ModelError(
            f"new tokens {list(ids)} do not fit an embedding of {size} rows",
            why="rows past its end must follow one another, each with a token of its own",
            fix="check that the tokenizer's files belong to this model",
        )
    return max(size, ids[-1] + 1)


class Vocabulary:
    """The frozen embedding and head of a loaded model, which can be widened, and narrowed again without a copy."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, token_layers(model)
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        self._wide: list[Tensor] = [model.get_submodule(name).weight.detach() for name in self.layers.names]
        self.size = len(self._wide[0])
        self.means = [_mean(weight) for weight in self._wide]
        self.scale = _scale(self.embedding)

    def resize(self, size: int) -> None:
        """Lets the model have `size` rows; those that its base lacks are the mean of the base's."""
        if size == len(self.embedding.weight):
            return
        if missing := max(0, size - len(self._wide[0])):
            means = [mean.to(weight).expand(missing, -1) for weight, mean in zip(self._wide, self.means, strict=True)]
            self._wide = [torch.cat(parts) for parts in zip(self._wide, means, strict=True)]
        weights = [nn.Parameter(weight[:size], requires_grad=False) for weight in self._wide]
        self.embedding.weight, self.embedding.num_embeddings = weights[0], size
        self.head.weight, self.head.out_features = weights[-1], size
        self.model.config.get_text_config().vocab_size = size


def _mean(weight: Tensor) -> Tensor:
    """[hidden] the mean of all rows, float32."""
    sums = [part.float().sum(0) for part in weight.split(AT_ONCE)]
    return torch.stack(sums).sum(0) / len(weight)


class TokenRows(nn.Module):
    """Trained rows of a model's embedding and, where it has a weight of its own, of its head."""

    ids: Tensor

    def __init__(self, vocabulary: Vocabulary, ids: Sequence[int], dtype: torch.dtype) -> None:
        """Rows for `ids`, in order, stored in `dtype`; not yet in use. `ModelError` for ids that do not fit."""
        super().__init__()
        self._vocabulary = vocabulary
        self._size = check_ids(ids, vocabulary.size)
        self._hooks: list[Any] = []
        self.active = True
        """False: the model computes with the frozen rows alone."""
        device = vocabulary.embedding.weight.device
        self.register_buffer("ids", torch.tensor(ids, device=device), persistent=False)
        first = [mean.to(device, dtype).repeat(len(ids), 1) for mean in vocabulary.means]
        self.embedding = nn.Parameter(first[0])
        self.head = nn.Parameter(first[1]) if len(first) > 1 else None

    @property
    def size(self) -> int:
        """Rows that the model has while these are in use."""
        return self._size

    @property
    def of_head(self) -> nn.Parameter:
        """[n, hidden] with which the head multiplies."""
        return self.embedding if self.head is None else self.head

    def by_layer(self) -> dict[str, nn.Parameter]:
        """The rows [n, hidden] by the name of the layer that they belong to."""
        rows = [self.embedding] if self.head is None else [self.embedding, self.head]
        return dict(zip(self._vocabulary.layers.names, rows, strict=True))

    def put_in(self) -> None:
        """Lets the model compute with these rows."""
        vocabulary = self._vocabulary
        assert rows_of(vocabulary.model) is None, "other rows are in use"
        vocabulary.resize(self._size)
        self._hooks = [
            vocabulary.embedding.register_forward_hook(self._embed),
            vocabulary.head.register_forward_hook(self._logits),
        ]
        vocabulary.model.add_module(NAME, self)

    def take_out(self) -> None:
        """Lets it compute without them; it stays as wide as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        delattr(self._vocabulary.model, NAME)

    def _embed(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.active:
            return output
        place = torch.searchsorted(self.ids, args[0]).clamp_(max=len(self.ids) - 1)
        new = (self.ids[place] == args[0]).unsqueeze(-1)
        return torch.where(new, looked_up(place, self.embedding.to(output.dtype)) * self._vocabulary.scale, output)

    def _logits(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.active:
            return output
        return output.index_copy_(-1, self.ids, linear(args[0], self.of_head.to(args[0].dtype)).to(output.dtype))


@torch.no_grad()
def _scale(embedding: Any) -> Any:
    """What an embedding multiplies its rows with (Gemma's do), tried out. `ModelError` where that is not all."""
    weight, scale = embedding.weight, getattr(embedding, "embed_scale", 1.0)
    scale = scale.to(weight.dtype) if isinstance(scale, Tensor) else scale
    ids = torch.arange(min(4, len(weight)), device=weight.device)
    if not torch.equal(embedding(ids), looked_up(ids, weight) * scale):
        raise _refusal(f"its {type(embedding).__name__} does more than to look rows up")
    return scale


def rows_of(model: Any) -> TokenRows | None:
    """The rows that the model computes with, if any."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, TokenRows) else None


def add_rows(model: Any, ids: Sequence[int], dtype: torch.dtype) -> TokenRows | None:
    """Rows for `ids` put into a bare model; None where there are no ids. Call it after `attach`, which freezes all."""
    if not ids:
        return None
    rows = TokenRows(Vocabulary(model), ids, dtype)
    rows.put_in()
    return rows


@torch.no_grad()
def widen(model: Any, ids: Sequence[int]) -> None:
    """Gives the model rows for `ids` that are its own, for every weight of it to be trained."""
    if not ids:
        return
    vocabulary = Vocabulary(model)
    vocabulary.resize(check_ids(ids, vocabulary.size))
    for name, mean in zip(vocabulary.layers.names, vocabulary.means, strict=True):
        weight = model.get_submodule(name).weight
        weight[list(ids)] = mean.to(weight)


def make_room(model: Any, tokens: int) -> None:
    """Widens a bare base for a tokenizer of so many tokens, should it lack rows: to the base, a new token is the mean
    of those it has."""
    if tokens > len(model.get_input_embeddings().weight):
        assert rows_of(model) is None, "an adapter with new tokens is in use"
        Vocabulary(model).resize(tokens)


class TokenSwitch:
    """The token rows of several adapters over one base, of which at most one is in use. Where none is, the base is as
    wide as the last one left it: it is asked in that one's words, and knows of new ones no more than their mean."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocabulary: Vocabulary | None = None
        self._rows: dict[str, TokenRows] = {}

    def add(self, name: str, ids: Sequence[int], dtype: torch.dtype) -> TokenRows | None:
        """Rows for the tokens of adapter `name`, to be filled; None where it has none."""
        if not ids:
            return None
        self._vocabulary = self._vocabulary or Vocabulary(self._model)
        self._rows[name] = TokenRows(self._vocabulary, ids, dtype).requires_grad_(False)
        return self._rows[name]

    def use(self, name: str | None) -> None:
        """Puts the rows of adapter `name` in place, and narrows the base for one without any."""
        current = rows_of(self._model)
        if current is not None:
            current.take_out()
        if name in self._rows:
            self._rows[name].put_in()
        elif name is not None and self._vocabulary is not None:
            self._vocabulary.resize(self._vocabulary.size)
