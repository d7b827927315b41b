"""DoRA as LyCORIS and the UIs write it: LoRA's tensors and `dora_scale`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError
from adapterkit.formats.codecs.lycoris_lora import LoRACodec

_SCALE = "dora_scale"
_OWN = ("over", "scale_bias", "plain_norm")
"""What a DoRA's config has beside a LoRA's."""


class DoRACodec(Codec):
    """`m (W + D) / |W + D|`: m [out, 1, ...] over each output's inputs, or [1, in, ...] over each input's outputs."""

    names = LoRACodec.names | {_SCALE}
    types = frozenset({"dora"})

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        others = {"lora_mid.weight"}
        needed = {"lora_down.weight", "lora_up.weight", _SCALE}
        return self.names & names if needed <= names and not others & names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return LoRACodec().shape(tensors)

    def for_all(self, tensors: Mapping[str, Tensor]) -> bool:
        return True  # it has parts by rows, but a file holds it for a layer as a whole

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Said:
        scale = tensors[_SCALE]
        over_outputs = _over_outputs(scale)
        if scale.numel() != place.shape[1 if over_outputs else 0]:
            told = f"dora_scale is {tuple(scale.shape)}, and the model's weight {place.shape}"
            raise ShapeMismatchError(told, context.where, place.point.path)
        if (over_outputs and place.rows is not None) or place.columns is not None:
            told = "DoRA over all outputs of a layer cannot be told apart for its parts"
            raise CheckpointError(told, context.where, place.point.path)
        lora = LoRACodec().read({name: t for name, t in tensors.items() if name != _SCALE}, place, context)
        own = scale.flatten() if over_outputs else place.of_rows(scale.flatten())
        config = {**lora.config, "over": "outputs" if over_outputs else "inputs"}
        return Said("dora", config, {**lora.tensors, "magnitude": own.contiguous()})

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        first, one = said[0]
        if any(own.config.get("scale_bias") or own.config.get("plain_norm") for _, own in said):
            told = "DoRA with scale_bias or plain_norm cannot be said here; native and adapterhub can"
            raise CheckpointError(told, context.where, first.point.id)
        over_outputs = one.config.get("over") == "outputs"
        if (len(said) > 1 or not first.whole) and (over_outputs or not _are_all_rows(said)):
            told = "DoRA at parts of a fused layer cannot be said for the layer"
            raise CheckpointError(told, context.where, first.point.id)
        magnitude = one.tensors["magnitude"]
        if len(said) > 1:
            magnitude = magnitude.new_empty(first.shape[0])
            for place, own in said:
                rows = place.rows if isinstance(place.rows, slice) else list(place.rows or ())
                magnitude[rows] = own.tensors["magnitude"]
        found = LoRACodec().write([(place, _without_magnitude(own)) for place, own in said], context)
        shape = [1] * len(first.shape)
        shape[1 if over_outputs else 0] = -1
        return {**found, _SCALE: magnitude.view(shape)}


def _are_all_rows(said: Sequence[tuple[Place, Said]]) -> bool:
    """Whether parts have norms of rows each, and are all of a layer's: the norms of rows do not depend on another's."""
    alone = all(
        place.rows is not None and place.columns is None and own.config.get("over") != "outputs" for place, own in said
    )
    points = {place.point.id: place.point.out_features for place, _ in said}
    return alone and len(points) == len(said) and sum(points.values()) == said[0][0].shape[0]


def _without_magnitude(said: Said) -> Said:
    config = {name: value for name, value in said.config.items() if name not in _OWN}
    return Said("lora", config, {name: tensor for name, tensor in said.tensors.items() if name != "magnitude"})


def _over_outputs(scale: Tensor) -> bool:
    return scale.ndim > 1 and scale.shape[1] > 1
