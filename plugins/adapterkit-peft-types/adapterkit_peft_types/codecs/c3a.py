"""C3A in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit_peft_types.codecs.modules import check_shapes
from adapterkit_peft_types.codecs.whole import WholeCodec


class C3ACodec(WholeCodec):
    """`c3a_kernel` [out / b, in / b, b]."""

    names = required = frozenset({"c3a_kernel"})
    axes: ClassVar[Mapping[str, int]] = {"c3a_kernel": 3}
    types = frozenset({"c3a"})
    peft_type = "C3A"

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        rows, columns, block = tensors["c3a_kernel"].shape
        return (rows * block, columns * block)

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        kernel = tensors["c3a_kernel"]
        block = max(kernel.shape[-1], 1)
        check_shapes(place, context, c3a_kernel=(kernel, (place.shape[0] // block, place.shape[1] // block, block)))
        return self.at(place, Said("c3a", {"block": block}, {"kernel": kernel}), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        return {"block_size": said.tensors["kernel"].shape[-1], "block_size_pattern": {}}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {"c3a_kernel": said.tensors["kernel"]}
