"""Types for the fields of records that `dvae.utils.read` checks: numbers within bounds that no honest file exceeds."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
"""A whole number from 0 that fits 64 bits."""
Positive: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]
"""A whole number from 1 that fits 64 bits."""
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=1e11)]
"""A duration, or a time in seconds since 1970, up to the year 5138."""
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither infinite nor NaN."""
Number: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float
"""A number as it was written; a whole number of more than 64 bits becomes a float."""
