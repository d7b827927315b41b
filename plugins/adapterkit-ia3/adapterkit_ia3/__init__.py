"""(IA)3 for adapterkit. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the type `ia3`."""
    summary = "one learnt factor per feature; merges without a trace"
    return [AdapterSpec("ia3", "adapterkit_ia3.ia3:IA3", kinds=frozenset({"weight", "output"}), summary=summary)]


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """How PEFT writes it."""
    return [
        CodecSpec("peft_ia3", "adapterkit_ia3.codec:IA3Codec", dialect="peft", summary="ia3_l, of outputs or of inputs")
    ]
