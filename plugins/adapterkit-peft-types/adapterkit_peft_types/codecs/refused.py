"""Types of PEFT whose files say too little, or more than an adapter: what would carry them is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import UnsupportedFileError

_CONVERTED = "PEFT's own save_as_lora writes it as a LoRA, which is read"
_MERGED = "In PEFT, merge it, and extract a LoRA from what it gives: adapterkit extract"
_REASONS = {
    "XLORA": (
        "it is a gate over LoRAs. Load each of these (the folders beside the config, 0, 1, ...) as an adapter of its "
        "own; adapterkit_gating's Gate is what carries the gate, and PEFT's file of it lacks layers"
    ),
    "ADAMSS": (
        "its file does not say which rows of the weight each of its parts is for: PEFT finds them again by a "
        f"clustering of scikit-learn's. {_MERGED}"
    ),
    "FROD": f"it is a decomposition of all layers' weights together, of full rank, which no type here has. {_MERGED}",
    "UNILORA": f"its numbers are dealt to the entries of all layers' factors together. {_CONVERTED}",
    "SHADOW": "it is a second, smaller model beside the base, and no adapter of layers: nothing here carries it",
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
