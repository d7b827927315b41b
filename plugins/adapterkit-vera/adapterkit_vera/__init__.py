"""VeRA. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the type `vera`."""
    summary = "two vectors a layer, around random projections that all layers share"
    return [AdapterSpec("vera", "adapterkit_vera.vera:VeRA", kinds={"weight"}, summary=summary)]


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """How PEFT writes it."""
    return [
        CodecSpec(
            "peft_vera",
            "adapterkit_vera.codec:VeRACodec",
            dialect="peft",
            summary="two vectors a module, and projections for all",
        )
    ]
