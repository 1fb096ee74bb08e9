"""Bounded number types for the fields of records that `dvae.utils.read` checks."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
"""An integer in [0, 2**63)."""
Positive: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]
"""An integer in [1, 2**63)."""
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=1e11)]
"""A duration in seconds, or a time in seconds since 1970 (at most the year 5138)."""
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither infinite nor NaN."""
Number: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float
"""A number whose type is kept: an integer of up to 64 bits stays an integer. A larger one becomes a float."""
