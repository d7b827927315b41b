"""FourierFT. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the type `fourierft`."""
    summary = "a weight's update from a few coefficients of its spectrum"
    return [AdapterSpec("fourierft", "adapterkit_fourierft.fourierft:FourierFT", kinds={"weight"}, summary=summary)]


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """How PEFT writes it."""
    return [
        CodecSpec(
            "peft_fourierft",
            "adapterkit_fourierft.codec:FourierFTCodec",
            dialect="peft",
            summary="the coefficients of a module",
        )
    ]
