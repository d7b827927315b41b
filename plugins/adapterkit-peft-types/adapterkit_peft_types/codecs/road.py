"""RoAd in files of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_peft_types.codecs.modules import check_shapes, field
from adapterkit_peft_types.codecs.whole import WholeCodec
from adapterkit_peft_types.road import RoAd

_NAMES = {"theta": "road_theta", "alpha": "road_alpha"}


class RoAdCodec(WholeCodec):
    """`road_theta` and `road_alpha` [out / 2], [out] or [2 out]; the size of groups is in the config."""

    names = required = frozenset(_NAMES.values())
    types = frozenset({"road"})
    peft_type = "ROAD"

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        own, out = {name: tensors[other] for name, other in _NAMES.items()}, place.shape[0]
        size, group = own["theta"].numel(), field(context, "group_size", 64)
        variant = {out: 1, 2 * out: 2, 4 * out: 4}.get(2 * size)
        if variant is None or group < 2 or out % group:
            told = f"has {size} angles in groups of {group} features, for {out}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        check_shapes(place, context, **{other: (own[name], (size,)) for name, other in _NAMES.items()})
        return self.at(place, Said("road", {"variant": variant, "group": group}, own), context)

    def fields(self, said: Said, place: Place, context: Context) -> Mapping[str, Any]:
        config = RoAd.from_dict(said.config)
        return {"variant": f"road_{config.variant}", "group_size": config.group_at(place.point)}

    def tensors(self, said: Said, place: Place, context: Context) -> Mapping[str, Tensor]:
        return {other: said.tensors[name] for name, other in _NAMES.items()}
