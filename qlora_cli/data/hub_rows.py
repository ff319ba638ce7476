"""Rows of a dataset on the Hub, through `datasets`.

Knows the Hub and its errors, nothing of files here. Invariant: what the Hub or its library says becomes an error of
ours; rows are Python objects a few at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.columnar import BATCH, faults
from qlora_cli.data.rows import Outcome, Place, Position, first_line
from qlora_cli.errors import DataError, MachineError
from qlora_cli.hub import hub_reachable


@dataclass(frozen=True)
class HubName:
    """Which rows of the Hub."""

    id: str
    split: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset, fetched; `table` is what `datasets` made of it."""

    name: HubName
    table: Any

    @property
    def files(self) -> tuple[str, ...]:
        """`ID[SPLIT]`, in the place of files."""
        return (f"{self.name.id}[{self.name.split}]",)

    @property
    def bytes(self) -> int | None:
        """Not known."""
        return None

    def fingerprint(self) -> str:
        """A hash of what was asked for and of what `datasets` knows the answer by."""
        name = self.name
        asked = [name.id, name.config, name.split, name.revision, str(getattr(self.table, "_fingerprint", ""))]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def rows(self, position: Position | None = None) -> Iterator[Outcome]:
        """The rows, numbered from 0. Raises `DataError` where there is none."""
        place = Place(self.files[0], number=0)
        try:
            for columns in self.table.iter(batch_size=BATCH):
                for values in zip(*columns.values(), strict=True):
                    yield place.row(dict(zip(columns, values, strict=True)))
                    place.number += 1
        except faults() as error:
            yield place.rest_lost(f"the row cannot be read: {first_line(error)}")
            return
        if place.number == 0:
            raise DataError(f"{self.files[0]} has no rows", fix="check data.split and that this is the right dataset")


def open_hub(name: HubName) -> HubSource:
    """Fetches the rows, or takes them from the cache. Raises `DataError` for a split or config that does not exist,
    `MachineError` for a Hub out of reach."""
    import datasets
    from huggingface_hub import errors as hub_errors

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # use what is in the cache, at once
    hub = (datasets.exceptions.DatasetsError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError)
    try:
        table = datasets.load_dataset(name.id, name.config, split=name.split, revision=name.revision)
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError, *hub) as error:
        raise _hub_error(name, error) from error
    return HubSource(name, table)


def _hub_error(name: HubName, error: Exception) -> DataError | MachineError:
    detail = first_line(error)
    if isinstance(error, ValueError) and "config" in detail.lower():
        configs = " ".join(str(error).split())[:300]
        given = f"has no config `{name.config}`" if name.config else "has several configs"
        return DataError(f"{name.id} {given}: {configs}", fix="set the source's config")
    if isinstance(error, ValueError) and "split" in detail.lower():
        return DataError(f"{name.id} has no split `{name.split}`: {detail}", fix="set data.split")
    if isinstance(error, RuntimeError) and "scripts" in detail.lower():
        why = "code from the Hub is never run"
        return DataError(f"{name.id} consists of a program: {detail}", why, "name a local file in data.train")
    return MachineError(
        f"{name.id}: no such file here, and the Hub dataset could not be read: {detail}",
        why="a gated or private dataset needs a login, and an offline machine a local copy",
        fix="run `hf auth login`, or name a local .jsonl file in data.train",
    )
