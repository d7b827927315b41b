"""What AdapterHub does to keys, values and hidden states: prefix tuning and ReFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapters.sublayer_net import ACTIVATIONS
from adapterkit.checkpoint import Part
from adapterkit.errors import BaseMismatchError, InvalidHeaderError, ShapeMismatchError
from adapterkit.formats.adapterhub_config import Fields
from adapterkit.formats.adapterhub_names import HIDDEN, Block, Places
from adapterkit.formats.adapterhub_read import Found, Reading, activation, fits, part

Attentions = Sequence[tuple[Block, str]]
"""The blocks of the attentions of one kind, each with its point's id."""


# -- prefixes ---------------------------------------------------------------------------------------------------------


def prefixes(reading: Reading, fields: Fields) -> list[Part]:
    """Prefix tuning: in the tool one tensor, or one network, makes the keys and values of all layers of a kind."""
    found = reading.taken(reading.keys.take_whole("prefix_tunings"))
    config: dict[str, Any] = {"length": fields["prefix_length"]}
    if fields["use_gating"]:
        config["gating"] = "shared" if fields["shared_gating"] else "separate"
    if fields["dropout"]:
        reading.note(f"dropout={fields['dropout']:g} is no option of prefixes here")
    points: dict[str, dict[str, Tensor] | None] = {}
    settings: dict[str, dict[str, Any]] = {}
    for location, role, attentions in locations(reading.places, fields):
        if reading.places.family.relative and role == "attn.kv":
            if fields["leave_out"]:
                raise fields.refused(
                    "in a model with relative positions: the tool drops them in such layers", "leave_out"
                )
            settings |= {key: {"counted": True} for _, key in attentions}
        made = _made(reading, found, fields, location)
        if made is None:
            points |= {key: None for _, key in attentions}
        elif attentions:
            points |= _in_layers(reading, found, fields, made, (location, role), attentions)
        else:
            told = f"has prefixes of a kind of attention ({location}) that the model does not have"
            raise BaseMismatchError(told, reading.where, next(map(found.key, found)))
    return [part("prefix", config, points, settings=settings)] if points else []


def locations(places: Places, fields: Fields) -> list[tuple[str, str, Attentions]]:
    """The tool's word for each kind of attention that the config asks for, the role there, and where it is."""
    found: list[tuple[str, str, Attentions]] = []
    for stack in places.family.stacks:
        if fields["encoder_prefix"] or not stack.prefix.startswith("encoder"):
            every = [(block, key) for block, key in places.each("attn.kv", fields["leave_out"]) if block.stack is stack]
            found.append((stack.prefix, "attn.kv", every))
    if fields["cross_prefix"]:
        found.append(("cross_prefix", "cross.kv", [*places.each("cross.kv", fields["leave_out"])]))
    return found


def _made(reading: Reading, found: Found, fields: Fields, location: str) -> Tensor | None:
    """All keys and values of one kind of attention, flat; None where the file has none."""
    if not any(name.startswith(f"{location}.") for name in found):
        return None
    if fields["flat"]:
        return found(f"{location}.control_trans", None)
    reading.note("the network that makes the prefixes is read as what it makes: keys and values that train themselves")
    length, width = fields["prefix_length"], fields["bottleneck_size"]
    embedding = found(f"{location}.wte.weight", length, None)
    features = embedding.shape[1]
    down, low = found(f"{location}.control_trans.0.weight", width, features), found(f"{location}.control_trans.0.bias")
    up, high = found(f"{location}.control_trans.2.weight", None, width), found(f"{location}.control_trans.2.bias")
    if not fits(low.shape, (width,)) or not fits(high.shape, (len(up),)):
        told = f"shapes {tuple(low.shape)} and {tuple(high.shape)}, expected ({width},) and ({len(up)},)"
        raise ShapeMismatchError(told, reading.where, found.key(f"{location}.control_trans.2.bias"))
    wide = torch.promote_types(up.dtype, torch.float32)
    hidden = ACTIVATIONS[activation(fields)](nn.functional.linear(embedding.to(wide), down.to(wide), low.to(wide)))
    return nn.functional.linear(hidden, up.to(wide), high.to(wide)).to(up.dtype).flatten()


def _in_layers(
    reading: Reading, found: Found, fields: Fields, made: Tensor, kind: tuple[str, str], attentions: Attentions
) -> dict[str, dict[str, Tensor] | None]:
    """Every attention's keys and values, [heads, length, head_dim], with its gate."""
    location, role = kind
    length, layers = fields["prefix_length"], len(attentions)
    points = [reading.places.point(role, block) for block, _ in attentions]
    layout = next((point.layout for point in points if point is not None), None)
    width = made.numel() // (2 * length * layers) if layout is None else layout.kv_heads * layout.head_dim
    if made.numel() != 2 * length * layers * width:
        told = f"{made.numel():,} keys and values, and {length} positions at {layers} attentions of {width} features"
        key = next(found.key(name) for name in found if name.startswith(f"{location}."))
        raise BaseMismatchError(f"{told} have {2 * length * layers * width:,}", reading.where, key)
    # [length, layers, keys or values, heads, head_dim] -> of each layer [heads, length, head_dim].
    heads = 1 if layout is None else layout.kv_heads
    states = made.view(length, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    result: dict[str, dict[str, Tensor] | None] = {}
    for (block, key), own in zip(attentions, states, strict=True):
        prefix = "inner." if fields["use_gating"] else ""
        result[key] = {f"{prefix}keys": own[0].contiguous(), f"{prefix}values": own[1].contiguous()}
        if fields["use_gating"]:
            gates = reading.taken(reading.keys.take("prefix_gates", role, block))
            count = 1 if fields["shared_gating"] else 2
            result[key] |= {"gate.weight": gates("weight", count, None), "gate.bias": gates("bias", count)}  # type: ignore[operator]
    return result


# -- hidden states ----------------------------------------------------------------------------------------------------


def edits(reading: Reading, fields: Fields) -> list[Part]:
    """ReFT: edits of what whole blocks give, at the first and the last positions."""
    if not fields["output_reft"]:
        raise fields.refused("edits nothing", "output_reft")
    prefix, suffix = fields["prefix_positions"], fields["suffix_positions"]
    if not prefix and not suffix:
        raise InvalidHeaderError("with suffix_positions=0 edits nothing", fields.where, "config.prefix_positions")
    if fields["dropout"]:
        reading.note(f"dropout={fields['dropout']:g} is no option of ReFT here")
    form = _form(reading, fields)
    config = {
        "rank": fields["r"],
        "form": form,
        "prefix": prefix or None,
        "suffix": suffix or None,
        "tied": fields["tied_weights"],
        "activation": None if fields["non_linearity"] is None else activation(fields),
    }
    points: dict[str, dict[str, Tensor] | None] = {}
    settings: dict[str, dict[str, Any]] = {}
    for block, key in reading.places.each(HIDDEN):
        if fields["layers"] != "all" and block.layer not in fields["layers"]:
            continue
        found = reading.taken(reading.keys.take("refts", HIDDEN, block))
        points[key], orthonormal = _edit(found, fields) if found else (None, True)
        if form == "loreft" and not orthonormal:
            settings[key] = {"form": "noreft"}
            reading.note(
                "in some layers rows of ReFT's projection are zero or too long, as the tool computes them: noreft"
            )
    return [part("reft", config, points, settings=settings)] if points else []


def _form(reading: Reading, fields: Fields) -> str:
    direct = reading.direct or not fields["subtract_projection"]
    if fields["orthogonality"]:
        return "loreft"
    if not direct:
        reading.note("read as NoReFT: a file does not say whether it is DiReFT. If it is, load it with direft=True")
    return "direft" if direct else "noreft"


def _edit(found: Found, fields: Fields) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one layer, and whether all rows of its projections are orthonormal."""
    prefix, suffix, tied = fields["prefix_positions"], fields["suffix_positions"], fields["tied_weights"]
    units = {"first": 0 if tied or prefix else 1} | ({"last": 1} if prefix and suffix and not tied else {})
    idle = {0, 1} - set(units.values())
    found.pass_over(*(name for name in found if any(name.startswith(f"units.{i}.") for i in idle)))
    tensors: dict[str, Tensor] = {}
    orthonormal = True
    for edit, unit in units.items():
        source = found(f"units.{unit}.learned_source.weight", fields["r"], None)
        projection, regular = _projection(found, f"units.{unit}.projection", source.shape, fields)
        orthonormal &= regular
        tensors |= {
            f"{edit}.source": source,
            f"{edit}.bias": found(f"units.{unit}.learned_source.bias", fields["r"]),
            f"{edit}.projection": projection,
        }
    return tensors, orthonormal


def _projection(found: Found, name: str, shape: Sequence[int], fields: Fields) -> tuple[Tensor, bool]:
    """R [rank, d]. torch's parametrization makes it from two tensors, and its rows need not be orthonormal."""
    if not fields["orthogonality"]:
        return found(f"{name}.weight", *shape), True
    original = found(f"{name}.parametrizations.weight.original", *shape)
    base = found(f"{name}.parametrizations.weight.0.base", max(shape), max(shape))
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))
    made = layer.parametrizations.weight
    made.original.data, made[0].base = original.float(), base.float()
    with torch.no_grad():
        rows = layer.weight.clone()
    regular = torch.allclose(rows @ rows.mT, torch.eye(len(rows)), atol=1e-3)
    return rows.to(original.dtype), regular
