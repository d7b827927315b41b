"""(IA)3's tensors as LyCORIS writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_lycoris.codecs.updates import only

_WEIGHT, _ON_INPUT = "weight", "on_input"


class ScaledWeightCodec(Codec):
    """`weight` [out] or, where `on_input` is 1, [in]: `W (1 + w)`."""

    names = frozenset({_WEIGHT, _ON_INPUT})
    types = frozenset({"scaled_weight"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names if names >= self.names else frozenset()

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # it has parts by rows, but a file holds it for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        on_input = bool(tensors[_ON_INPUT].item())
        own = tensors[_WEIGHT].flatten()
        if len(own) != place.shape[1 if on_input else 0]:
            told = f"it has {len(own)} factors, and the model's weight is {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        own = place.of_columns(own, 0) if on_input else place.of_rows(own)
        return Said("scaled_weight", {"on_input": on_input}, {"weight": own.contiguous()})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        place, one = only(said, context)
        own, on_input = one.tensors["weight"], bool(one.config.get("on_input", False))
        if len(place.shape) > 2:
            own = own.view(1, -1, *(1,) * (len(place.shape) - 2))
        return {_WEIGHT: own, _ON_INPUT: torch.tensor(int(on_input))}
