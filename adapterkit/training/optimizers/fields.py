"""Types of keys that several optimizers have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running average a step keeps."""

Betas = Annotated[tuple[Share, Share], Field(strict=False)]  # YAML has lists
"""Two of them, of the gradient and of its square."""
