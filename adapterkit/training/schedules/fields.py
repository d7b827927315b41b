"""Types of keys that several schedules have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Floor = Annotated[float, Field(ge=0, le=1)]
"""The share of the rate that is left at the end."""
