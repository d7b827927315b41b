"""LoHa's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import ShapeMismatchError
from adapterkit_lycoris.codecs.updates import ALPHA, DORA, described, only, require_whole, update

_PAIRS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})


class LoHaCodec(Codec):
    """`(w1_a w1_b) * (w2_a w2_b) * alpha / rank`; with cores `t1`, `t2` the factors `wi_a` are [rank, out]."""

    names = _PAIRS | _CORES | {ALPHA, DORA}
    types = frozenset({"loha"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        return self.names & names if names >= _PAIRS else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        a, b, core = tensors["hada_w1_a"], tensors["hada_w1_b"], tensors.get("hada_t1")
        return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # it has parts by rows, but a file holds it for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        tucker = tensors.keys() >= _CORES
        parts = {name: tensors[name] for name in sorted(_PAIRS | (_CORES if tucker else frozenset()))}
        rank = parts["hada_w1_b"].shape[0]
        outputs = 1 if tucker else 0
        if any(parts[f"hada_w{i}_a"].shape != parts["hada_w1_a"].shape for i in (1, 2)) or rank < 1:
            raise ShapeMismatchError("its two products have other shapes", context.where, place.point.path)
        if parts["hada_w1_a"].shape[outputs] != place.shape[0]:
            told = f"it has {parts['hada_w1_a'].shape[outputs]} outputs, and the model's layer {place.shape[0]}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        if DORA in tensors or (place.columns is not None and len(place.shape) > 2):
            require_whole(place, "LoHa of this kind", context)
        for i in (1, 2):
            parts[f"hada_w{i}_a"] = place.of_rows(parts[f"hada_w{i}_a"], outputs).contiguous()
            parts[f"hada_w{i}_b"] = place.of_columns(parts[f"hada_w{i}_b"]).contiguous()
        return update("loha", rank, {"tucker": tucker}, parts, tensors)

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        own, beside = described(*only(said, context))
        return {**own, **beside}
