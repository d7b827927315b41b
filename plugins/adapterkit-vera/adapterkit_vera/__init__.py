"""VeRA. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the type `vera`."""
    summary = "two vectors a layer, around random projections that all layers share"
    return [AdapterSpec("vera", "adapterkit_vera.vera:VeRA", kinds={"weight"}, summary=summary)]
