"""JSON records that this program wrote, read back with their types.

Knows pydantic and files. Invariant: what is returned has the shape that was asked for, or a `ModelError` names file and
key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_cli.errors import ModelError
from qlora_cli.model.folder import read_json


class Record(BaseModel):
    """The keys of a record that are read; others may stand beside them."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


R = TypeVar("R", bound=Record)


def read_record(path: Path, shape: type[R]) -> R:
    """The record in `path`. Raises `ModelError` for what cannot be read or has another shape."""
    values = read_json(path)
    try:
        return shape.model_validate(values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ModelError(
            f"{path} is not as qlora wrote it: {'; '.join(wrong[:3])}",
            fix="take it from a copy or a checkpoint, or train again",
        ) from error
