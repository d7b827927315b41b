"""Types of PEFT whose files say too little, or more than an adapter: what would carry them is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.codec import Codec, Context, Place, Said
from adapterkit.errors import UnsupportedFileError

_REASONS = {
    "XLORA": (
        "it is a gate over LoRAs. Load each of these (the folders beside the config, 0, 1, ...) as an adapter of its "
        "own; adapterkit_gating's Gate is what carries the gate, and PEFT's file of it lacks layers"
    ),
    "ADAMSS": (
        "its file does not say which rows of the weight each of its parts is for: PEFT finds them again by a "
        "clustering of scikit-learn's. In PEFT, merge it, and extract a LoRA from what it gives: adapterkit extract"
    ),
}


class RefusedCodec(Codec):
    """Raises what can be done instead."""

    names = frozenset()

    def check(self, context: Context) -> None:
        """See `Codec.check`."""
        kind = context.config.get("peft_type")
        if isinstance(kind, str) and kind.upper() in _REASONS:
            told = f"is of PEFT's type {kind}: {_REASONS[kind.upper()]}"
            raise UnsupportedFileError(told, context.where, "peft_type")

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        """Nothing."""
        return frozenset()

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        """Is not asked."""
        return ()
