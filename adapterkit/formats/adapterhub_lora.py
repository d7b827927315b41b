"""AdapterHub's LoRA and its kin: with gates, DoRA, VeRA, MTL-LoRA and (IA)3, on layers that are fused too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Part
from adapterkit.contract.fields import is_number
from adapterkit.errors import MissingKeysError
from adapterkit.formats.adapterhub_config import Fields
from adapterkit.formats.adapterhub_names import FUSED, FUSED_PARTS, Block
from adapterkit.formats.adapterhub_read import Found, Reading, part

_LETTERS = ("q", "k", "v")
_LOST = (
    "the projections that all layers share are not in the file: the tool does not save them of a model without a head. "
    "The file is beyond repair; save the adapter again from a model that has one"
)


def low_rank(reading: Reading, fields: Fields) -> list[Part]:
    """LoRA and what the tool calls by its name."""
    scales = fields.choice("composition_mode", ("add", "scale")) == "scale"
    places = list(_places(reading, fields))
    points: dict[str, dict[str, Tensor] | None] = {}
    shared = reading.taken(reading.keys.take_whole("shared_parameters")) if _is_vera(fields) else None
    for role, block, parts in places:
        found = reading.taken(reading.keys.take("loras", role, block))
        if not found:
            points |= dict.fromkeys(parts.values())
            continue
        every = _factors(found, fields, len(parts)) if scales else _updates(reading, found, shared, fields, len(parts))
        points |= dict(zip(parts.values(), every, strict=True))
    if not points:
        return []
    if scales:
        _refuse_scaled(fields)
        return [_scaled(reading, fields, places, points)]
    return [_part(fields, points)]


def _places(reading: Reading, fields: Fields) -> Iterator[tuple[str, Block, dict[str, str]]]:
    """Role, block, and letter (or role) -> point id: where the config asks for something. Fused layers have several."""
    family, letters = reading.places.family, [one for one in _LETTERS if one in fields["attn_matrices"]]
    own = [f"{where}.{one}" for where in ("attn", "cross") for one in letters] if fields["selfattn_lora"] else []
    feed_forward = {"intermediate_lora": family.intermediate, "output_lora": family.output}
    own += [role for name, role in feed_forward.items() if fields[name]]
    for block in reading.places.blocks:
        if block.layer in fields["leave_out"]:
            continue
        ids = {role: reading.places.id(role, block) for role in own}
        fused = FUSED in block.stack.names
        if fused and letters and fields["selfattn_lora"]:
            inside = {role: key for role, key in ids.items() if role in FUSED_PARTS and key}
            yield FUSED, block, inside
        for role, key in ids.items():
            if key and role in block.stack.names:
                yield role, block, {role: key}


def _is_vera(fields: Fields) -> bool:
    return is_number(fields["vera_d"]) or is_number(fields["vera_b"])


# -- what is added ----------------------------------------------------------------------------------------------------


def _part(fields: Fields, points: Mapping[str, Mapping[str, Tensor] | None]) -> Part:
    """LoRA or DoRA at these points; a gate is a union's of one part."""
    rank, gated, dora = fields["r"], fields["use_gating"], fields["use_dora"]
    config: dict[str, Any] = {
        "rank": rank,
        "alpha": None if gated else float(fields["alpha"]),  # a gate stands in the place of the scale
        "dropout": float(fields["dropout"]),
    }
    if dora:
        if gated:
            raise fields.refused("with use_dora cannot be read: no type here has both", "use_gating")
        return part("dora", {**config, "scale_bias": True, "plain_norm": True}, points)
    if not gated:
        return part("lora", config, points)
    inner = {"type": "lora", "config": {**config, "settings": {key: {} for key in points}}}
    members = {
        key: {name if name.startswith("gates.") else f"members.0.{name}": tensor for name, tensor in own.items()}
        for key, own in points.items()
        if own is not None
    }
    return Part("union", {"parts": [inner], "gating": "sequence"}, members)


def _updates(
    reading: Reading, found: Found, shared: Found | None, fields: Fields, count: int
) -> list[dict[str, Tensor]]:
    """A, B and what is beside them for each point of a layer."""
    a, b = _pair(reading, found, shared, fields, count)
    own = [{"A": one, "B": other} for one, other in zip(a.chunk(count), b.chunk(count), strict=True)]
    if fields["use_dora"]:
        magnitude = found("m.weight", len(b), 1).view(-1)
        for one, piece in zip(own, magnitude.chunk(count), strict=True):
            one["magnitude"] = piece
    if fields["use_gating"]:
        weight, bias = found("gate.weight", count, None), found("gate.bias", count)
        for one, row, shift in zip(own, weight, bias, strict=True):
            one |= {"gates.0.weight": row, "gates.0.bias": shift}
    return own


def _pair(reading: Reading, found: Found, shared: Found | None, fields: Fields, count: int) -> tuple[Tensor, Tensor]:
    """A [count * rank, in] and B [out, rank] of a layer."""
    r = fields["r"]
    if shared is not None:
        if not shared:
            raise MissingKeysError(_LOST, reading.where, "shared_parameters.lora_A")
        reading.note("VeRA's matrices are dense in this tool: each layer's are read as one product, LoRA's A and B")
        a, b = shared("lora_A", r * count, None), shared("lora_B", None, r)
        return a, found("vera_B", len(b), len(b)) @ b @ found("vera_D", r, r)
    a = found("lora_A", r * count, None)
    if "task_specific.values" not in found:
        return a, found("lora_B", None, r)
    reading.note("MTL-LoRA's weighted projections are read as one, LoRA's B")
    weights = (found("weights", fields["n_up_projection"]) / fields["weights_sharpness"]).exp()
    every = found("lora_B", fields["n_up_projection"], None, r)
    values = found("task_specific.values")
    mixed = torch.einsum("n,nor->or", weights / weights.sum(), every)
    return a, mixed * values if values.ndim == 1 else mixed @ values.mT


# -- what is multiplied -----------------------------------------------------------------------------------------------


def _refuse_scaled(fields: Fields) -> None:
    for name in ("use_gating", "use_dora"):
        if fields[name]:
            raise fields.refused("with composition_mode='scale' cannot be read: no type here has both", name)


def _factors(found: Found, fields: Fields, count: int) -> list[dict[str, Tensor]]:
    """The factors for each point of a layer, with alpha in them."""
    scale = found("lora_B", None, 1).view(-1) * float(fields["alpha"])
    return [{"scale": piece} for piece in scale.chunk(count)]


def _scaled(
    reading: Reading,
    fields: Fields,
    places: list[tuple[str, Block, dict[str, str]]],
    points: dict[str, dict[str, Tensor] | None],
) -> Part:
    """(IA)3. In a fused layer the tool multiplies what it does not adapt by alpha too."""
    alpha = float(fields["alpha"])
    for role, block, parts in places:
        idle = [one for one in FUSED_PARTS if one not in parts] if role == FUSED and alpha != 1 else []
        for one in idle:
            point = reading.places.point(one, block)
            if point is not None:
                points[point.id] = {"scale": torch.full((point.out_features,), alpha)}
    return part("ia3", {"scale_input": None}, points)
