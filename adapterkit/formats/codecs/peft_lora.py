"""LoRA and DoRA as PEFT writes them: two factors and a magnitude, with rank and alpha in the config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Codec, Context, Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.errors import CheckpointError, MissingKeysError, ShapeMismatchError, UnsupportedFileError, shown
from adapterkit.formats.codecs import peft_experts, peft_groups
from adapterkit.formats.codecs.peft_base import whole_base
from adapterkit.formats.codecs.peft_starts import started
from adapterkit.formats.codecs.peft_tied import tied
from adapterkit.formats.low_rank import factors_of, joined

_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")

_TYPE = "LORA"
_OF_DORA = ("scale_bias", "plain_norm", "over")

_OTHER_FORWARDS = {
    "alora_invocation_tokens": "acts from the position of certain tokens on",
    "arrow_config": "routes each token among other adapters",
    "use_qalora": "pools the input of quantized layers",
    "use_bdlora": "has block-diagonal factors",
    "kasa_config": "cuts the base's smallest singular values off",
}
"""Options of LoRA's config that make it compute something else."""

_KNOWN = _OTHER_FORWARDS.keys() | frozenset(
    [
        "alpha",
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "enable_lora",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
    ]
)
"""What has been seen in configs of LoRA up to PEFT 0.21. What else is set may change what is computed."""


class LoRACodec(Codec):
    """`s B A`: A [rank, in, *kernel], B [out, rank, 1, ...], s from the config; with a magnitude for each row, DoRA."""

    names = frozenset({_A, _B, _BIAS, _EMBEDDING_A, _EMBEDDING_B, *_MAGNITUDES})
    types = frozenset({"lora", "dora"})
    writes_factors = True

    def takes(self, names: Set[str], context: Context) -> Set[str]:
        if str(context.config.get("peft_type") or _TYPE).upper() != _TYPE:
            return frozenset()
        pair = {_A, _B} if names & {_A, _B} else {_EMBEDDING_A, _EMBEDDING_B}
        return {*pair, _BIAS, *_MAGNITUDES} & names if pair & names else frozenset()

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if not _is_pair(tensors):
            return None
        a, b, _ = _factors(tensors)
        return (b.shape[0], *a.shape[1:])

    def read(self, tensors: Mapping[str, Tensor], place: Place, context: Context) -> Sequence[Said]:
        if told := [f"{name}, which {what}" for name, what in _OTHER_FORWARDS.items() if context.config.get(name)]:
            raise UnsupportedFileError(f"is LoRA with {told[0]}; there is no such type here", context.where)
        if unknown := sorted(name for name, value in context.config.items() if value and name not in _KNOWN):
            context.note(f"its config sets {', '.join(map(shown, unknown[:5]))}, which is unknown here and looked past")
        if not _is_pair(tensors):
            told = f"has only {', '.join(sorted(tensors))} here, and LoRA has two factors"
            raise MissingKeysError(told, context.where, place.point.path)
        a, b, magnitude = _factors(tensors)
        if magnitude is None and context.config.get("use_dora"):
            told = "has no magnitude here, and its config says that it is DoRA"
            raise MissingKeysError(told, context.where, place.point.path)
        if place.point.layout.index is not None:
            a, b = peft_experts.one(a, b, place, context)
        if place.point.form == "embedding" and _A in tensors:
            a, b = b.mT, a.mT  # of the parameter as it is kept, [entries, width]
        if peft_groups.is_grouped(place):
            return _ungrouped(a, b, magnitude, place, context)
        a, b = _checked(a, b, place, context)
        config = _config(len(a), place, context)
        own = {"A": place.of_columns(a).contiguous(), "B": place.of_rows(b).contiguous()}
        kind = "lora"
        if magnitude is not None and place.columns is not None:
            return [_of_columns(a, b, _magnitude(magnitude, place, context), _scale(config), place, context)]
        if magnitude is not None:
            kind, own["magnitude"] = "dora", place.of_rows(_magnitude(magnitude, place, context)).contiguous()
        scale = _scale(config)
        config, own = started(config, own, scale, place, context)
        return [tied(Said(kind, config, own), place, context), *_bias(tensors.get(_BIAS), scale, place, context)]

    def write(self, said: Sequence[tuple[Place, Said]], context: Context) -> Mapping[str, Tensor]:
        first, one = said[0]
        context.config |= {"peft_type": _TYPE, "rank_pattern": {}, "alpha_pattern": {}}
        if peft_groups.is_grouped(first) and one.type != "dora":
            a, b, rank, scale = peft_groups.written(said, context)
        elif first.point.layout.index is not None:
            a, b, rank, scale = peft_experts.stacked(_pairs(said, context), context)
        else:
            a, b, scale = joined(_pairs(said, context))
            rank = len(a)
        context.config |= {"r": rank, "lora_alpha": _alpha(one, rank, scale), **_training(one)}
        if first.point.form == "linear_t":
            context.config["fan_in_fan_out"] = True
        if first.point.form == "embedding":
            return {_EMBEDDING_A: a, _EMBEDDING_B: b, **_written_magnitude(said, context)}
        ones = (1,) * (a.ndim - 2)
        return {_A: a, _B: b.reshape(*b.shape, *ones), **_written_magnitude(said, context)}


def _is_pair(tensors: Mapping[str, Tensor]) -> bool:
    return any(pair <= tensors.keys() for pair in ({_A, _B}, {_EMBEDDING_A, _EMBEDDING_B}))


def _pairs(said: Sequence[tuple[Place, Said]], context: Context) -> list[tuple[Place, Factors]]:
    found = [(place, factors_of(_plain(one), place.point, context.where, context.made)) for place, one in said]
    return [(place, factors) for place, factors in found if factors is not None]


def _ungrouped(a: Tensor, b: Tensor, magnitude: Tensor | None, place: Place, context: Context) -> list[Said]:
    if magnitude is not None:
        told = "is DoRA of a grouped convolution, whose update in PEFT is none of its weight"
        raise UnsupportedFileError(told, context.where, place.point.path)
    a, b = peft_groups.ungrouped(a, b, place, context)
    return [Said("lora", {**_config(len(a), place, context), "across_groups": True}, {"A": a, "B": b})]


def _plain(said: Said) -> Said:
    """The update of DoRA without the magnitude."""
    if said.type != "dora":
        return said
    config = {name: value for name, value in said.config.items() if name not in _OF_DORA}
    return Said("lora", config, {name: tensor for name, tensor in said.tensors.items() if name != "magnitude"})


def _factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    a, b = (
        tensors[own] if own in tensors else tensors[other] for own, other in ((_A, _EMBEDDING_A), (_B, _EMBEDDING_B))
    )
    return a, b, next((tensors[name] for name in _MAGNITUDES if name in tensors), None)


def _checked(a: Tensor, b: Tensor, place: Place, context: Context) -> tuple[Tensor, Tensor]:
    """The factors as [rank, in / groups, *kernel] and [out, rank]."""
    rank, wanted = a.shape[0], context.config.get("r")
    told = f"A is {tuple(a.shape)} and B {tuple(b.shape)}, for a weight of {place.shape}"
    if rank < 1 or (wanted is not None and wanted != rank):
        raise ShapeMismatchError(f"{told}; the config has rank {shown(wanted)}", context.where, place.point.path)
    if tuple(a.shape[1:]) != tuple(place.shape[1:]) or tuple(b.shape[:2]) != (place.shape[0], rank):
        raise ShapeMismatchError(told, context.where, place.point.path)
    if b.flatten(1).shape[1] != rank:
        raise ShapeMismatchError(told, context.where, place.point.path)
    return a, b.flatten(1)


def _config(rank: int, place: Place, context: Context) -> dict[str, Any]:
    alpha = context.config.get("lora_alpha")
    config: dict[str, Any] = {"rank": rank, "alpha": rank if alpha is None else alpha}
    if context.config.get("use_rslora"):
        config["scaling"] = "rank_stabilized"
    dropout = context.config.get("lora_dropout")
    if dropout:
        config["dropout"] = 0.0 if place.point.is_read else dropout
    return config


def _bias(bias: Tensor | None, scale: float, place: Place, context: Context) -> list[Said]:
    """What `lora_bias` adds to an output: a change of the bias, or one where there was none."""
    if bias is None or not _is_first(place) or not bool(bias.any()):
        return []
    if bias.shape != place.shape[:1]:
        told = f"B's bias is {tuple(bias.shape)}, for {place.shape[0]} outputs"
        raise ShapeMismatchError(told, context.where, place.point.path)
    shift = (place.of_rows(bias) * scale).contiguous()
    absolute = not place.point.layout.bias
    config = {"part": "bias", "absolute": absolute, "rows": None}
    return [Said("trainable", config, {"bias" if absolute else "shift": shift})]


def _of_columns(a: Tensor, b: Tensor, magnitude: Tensor, scale: float, place: Place, context: Context) -> Said:
    """DoRA on a layer whose inputs are several points: the norms are of all, so that a part has but its own weights."""
    direction = whole_base(place, context.where)[0] + scale * (b @ a)
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    context.note(f"{place.point.path}: DoRA on a layer with several points as inputs is read as the weights it gives")
    own = place.of_columns(weight).to(a.dtype).contiguous()
    return Said("trainable", {"part": "weight", "absolute": False}, {"weight": own})


def _is_first(place: Place) -> bool:
    """Whether the point is the first of those that see the module's inputs each in part, and add to one output."""
    columns = place.columns
    return columns is None or (columns.start if isinstance(columns, slice) else columns[0]) == 0


def _scale(config: Mapping[str, Any]) -> float:
    return config["alpha"] / (math.sqrt(config["rank"]) if "scaling" in config else config["rank"])


def _magnitude(magnitude: Tensor, place: Place, context: Context) -> Tensor:
    if magnitude.numel() != place.shape[0]:
        told = f"the magnitude is {tuple(magnitude.shape)}, for {place.shape[0]} outputs"
        raise ShapeMismatchError(told, context.where, place.point.path)
    return magnitude.flatten()


def _alpha(said: Said, rank: int, scale: float) -> float:
    """The alpha that gives the scale; the config's own where it is the same."""
    alpha = said.config.get("alpha")
    return alpha if alpha is not None and alpha / rank == scale else scale * rank


def _training(said: Said) -> dict[str, Any]:
    dropout = said.config.get("dropout")
    return {"lora_dropout": dropout} if dropout else {}


def _written_magnitude(said: Sequence[tuple[Place, Said]], context: Context) -> dict[str, Tensor]:
    """The magnitude of the whole module: where a row has none of its own, the norm that leaves it as it is."""
    if all(one.type != "dora" for _, one in said):
        return {}
    for place, one in said:
        if one.config.get("over", "inputs") != "inputs":
            told = "PEFT's DoRA has norms over the inputs of each output; native, kohya and lycoris hold others"
            raise CheckpointError(told, context.where, place.point.path)
        if one.config.get("scale_bias") or (one.config.get("plain_norm") and one.config.get("alpha") is not None):
            told = "PEFT's DoRA scales no bias, and has the norm of the scaled update; native and adapterhub hold it"
            raise CheckpointError(told, context.where, place.point.path)
        if one.type != "dora":
            raise CheckpointError("one module has LoRA and DoRA; native holds any", context.where, place.point.path)
    first = said[0][0]
    if len({place.point.id for place, _ in said}) < len(said):
        told = "has DoRA twice, and each has norms of its own; native holds any"
        raise CheckpointError(told, context.where, first.point.path)
    if peft_groups.is_grouped(first):
        told = "DoRA of a grouped convolution, whose update in PEFT is none of its weight; native holds it"
        raise CheckpointError(told, context.where, first.point.path)
    context.config["use_dora"] = True
    if first.whole:
        kernel = len(first.shape) - 2
        magnitude = said[0][1].tensors["magnitude"]
        return {_MAGNITUDES[0]: magnitude.reshape(1, -1, *(1,) * kernel) if kernel else magnitude}
    found = torch.zeros(first.shape[0])
    covered = torch.zeros(first.shape[0], dtype=torch.bool)
    for place, one in said:
        rows = place.rows if isinstance(place.rows, slice) else list(place.rows or ())
        found[rows] = one.tensors["magnitude"].float()
        covered[rows] = True
    if not bool(covered.all()):
        told = "DoRA acts on a part of a fused projection, and PEFT's on all of it; native holds it"
        raise CheckpointError(told, context.where, first.point.path)
    return {_MAGNITUDES[0]: found}
