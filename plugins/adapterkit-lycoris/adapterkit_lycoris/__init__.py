"""The types of LyCORIS. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec, CodecSpec

_TYPES = (
    ("loha", "loha:LoHa", "weight", "the elementwise product of two low-rank updates"),
    ("lokr", "lokr:LoKr", "weight", "an update that is a Kronecker product"),
    ("tucker", "tucker:Tucker", "weight", "a low-rank update whose convolution is decomposed too"),
    ("oft", "oft:OFT", "weight", "a rotation of blocks of a weight's rows"),
    ("boft", "oft:BOFT", "weight", "a rotation of a weight's rows in butterfly factors"),
    ("full_diff", "diff:FullDiff", "weight", "a whole update of weight and bias"),
    ("norm_diff", "diff:NormDiff", "norm", "an update of a norm's gain and shift"),
    ("lycoris_glora", "glora:GLoRA", "weight", "a low-rank update, and one of what the weight sees"),
    ("scaled_weight", "scaled:ScaledWeight", "weight", "a factor for every row or column of a weight"),
)

_CODECS = (
    ("lycoris_loha", "loha:LoHaCodec", "hada_w1_a, hada_w1_b, ... and an alpha a module"),
    ("lycoris_lokr", "lokr:LoKrCodec", "lokr_w1, lokr_w2 or their factors"),
    ("lycoris_tucker", "tucker:TuckerCodec", "lora_down, lora_mid and lora_up"),
    ("lycoris_oft", "oft:OFTCodec", "oft_blocks, of one factor or several"),
    ("lycoris_diff", "diff:DiffCodec", "diff and diff_b, w_norm and b_norm"),
    ("lycoris_glora", "glora:GLoRACodec", "a1, a2, b1 and b2"),
    ("lycoris_ia3", "scaled:ScaledWeightCodec", "weight and on_input"),
    ("lycoris_tlora", "tlora:TLoRACodec", "q_layer, p_layer and lambda_layer"),
)

_PEFT = (
    ("peft_loha", "peft_loha:LoHaCodec", "hada_w1_a, hada_w1_b, ...; rank and alpha in the config"),
    ("peft_lokr", "peft_lokr:LoKrCodec", "lokr_w1, lokr_w2 or their factors; rank and alpha in the config"),
    ("peft_boft", "peft_boft:BOFTCodec", "boft_R and boft_s"),
)


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds every type of `_TYPES`."""
    return [
        AdapterSpec(name, f"adapterkit_lycoris.{target}", kinds={kind}, summary=summary)
        for name, target, kind, summary in _TYPES
    ]


@hookimpl
def adapterkit_register_codecs() -> list[CodecSpec]:
    """Adds every codec of `_CODECS`, and those of PEFT's files."""
    return [
        CodecSpec(name, f"adapterkit_lycoris.codecs.{target}", dialect=dialect, summary=summary)
        for dialect, codecs in (("lycoris", _CODECS), ("peft", _PEFT))
        for name, target, summary in codecs
    ]
