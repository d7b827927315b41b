"""IP-Adapter and LLaMA-Adapter. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds the types `ip_adapter` and `llama_adapter`."""
    home = "adapterkit_conditioning"
    return [
        AdapterSpec(
            "ip_adapter", f"{home}.ip_adapter:IPAdapter", kinds={"attention"}, summary="attention over image tokens"
        ),
        AdapterSpec(
            "llama_adapter",
            f"{home}.llama_adapter:LlamaAdapter",
            kinds={"attention"},
            summary="attention over a learnt prompt, gated from zero",
        ),
    ]


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """How PEFT writes `llama_adapter`."""
    return [
        CodecSpec(
            "peft_adaption_prompt",
            "adapterkit_conditioning.adaption_prompt:AdaptionPromptCodec",
            dialect="peft",
            summary="adaption_gate, adaption_prompt",
        )
    ]
