"""The types of LyCORIS. This module is what adapterkit imports when it starts, so it imports no torch."""

from __future__ import annotations

from adapterkit import hookimpl
from adapterkit.specs import AdapterSpec

_TYPES = (
    ("loha", "loha:LoHa", "weight", "the elementwise product of two low-rank updates"),
    ("lokr", "lokr:LoKr", "weight", "an update that is a Kronecker product"),
    ("tucker", "tucker:Tucker", "weight", "a low-rank update whose convolution is decomposed too"),
    ("oft", "oft:OFT", "weight", "a rotation of blocks of a weight's rows"),
    ("boft", "oft:BOFT", "weight", "a rotation of a weight's rows in butterfly factors"),
    ("full_diff", "diff:FullDiff", "weight", "a whole update of weight and bias"),
    ("norm_diff", "diff:NormDiff", "norm", "an update of a norm's gain and shift"),
)


@hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """Adds every type of `_TYPES`."""
    return [
        AdapterSpec(name, f"adapterkit_lycoris.{target}", kinds={kind}, summary=summary)
        for name, target, kind, summary in _TYPES
    ]
