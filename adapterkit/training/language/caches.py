"""Models that keep what they have read for the next token, which nobody wants who trains."""

from __future__ import annotations

import inspect
from typing import Any


def uncached(model: Any) -> dict[str, bool]:
    """What a call is told, so that nothing is kept: a block that is computed again would find it there twice."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
