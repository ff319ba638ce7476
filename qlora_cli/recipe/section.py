"""What every section of the recipe is, and the kinds of values that several have.

Knows pydantic only. Invariant: a section is frozen, takes no unknown key and no value of another type.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Metric = Annotated[
    str,
    Field(pattern=r"^(exact|contains|json|regex:[\s\S]+)$", title="exact, contains, json or regex:PATTERN"),
]
Dtype = Literal["bfloat16", "float16", "float32"]


class Section(BaseModel):
    """A part of the recipe: unknown keys refused, values of the stated type only, unchangeable once made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=False)
