"""Types of PEFT. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec

# One line a type, in the order of their names.
_TYPES = (
    ("beft", "beft:BEFT", "weight", "a bias beside the one that a projection has"),
)  # fmt: skip


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds every type of `_TYPES`."""
    return [
        AdapterSpec(name, f"adapterkit_peft_types.{target}", kinds={kind}, summary=summary)
        for name, target, kind, summary in _TYPES
    ]
