"""SHiRA in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_peft_types.codecs.modules import check_shapes
from adapterkit_peft_types.codecs.whole import WholeCodec


class SHiRACodec(WholeCodec):
    """`shira_weight` [n] and `shira_indices` [2, n], rows and columns, with n = r (in + out)."""

    names = required = frozenset({"shira_weight", "shira_indices"})
    types = frozenset({"shira"})
    peft_type = "SHIRA"

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        values, indices = tensors["shira_weight"], tensors["shira_indices"].int()  # on Windows they are floats
        rank = max(values.numel() // sum(place.shape[:2]), 1)
        count = rank * sum(place.shape[:2])
        check_shapes(place, context, shira_weight=(values, (count,)), shira_indices=(indices, (2, count)))
        if bool(((indices < 0) | (indices >= torch.tensor(place.shape[:2])[:, None])).any()):
            told = f"shira_indices names a place outside of the weight {place.shape}"
            raise CheckpointError(told, context.where, place.point.path)
        return self.at(place, Said("shira", {"rank": rank}, {"values": values, "indices": indices}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {"r": said.tensors["values"].numel() // sum(place.shape[:2]), "mask_type": "random"}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"shira_weight": said.tensors["values"], "shira_indices": said.tensors["indices"]}
