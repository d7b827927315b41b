"""LoRA, DoRA and (IA)3 as AdapterHub's LoRA configs: one for all points, so what differs is made alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Said
from adapterkit.errors import IncompatibleTargetError
from adapterkit.formats.adapterhub_names import FUSED, FUSED_PARTS, Block
from adapterkit.formats.adapterhub_writing import Child, Writing, number
from adapterkit.formats.low_rank import factors_of, module_of
from adapterkit.points import InjectionPoint

_ALL = "fused.attn"
_LETTERS = ("q", "k", "v")
_SCALE = "ia3"


@dataclass(frozen=True)
class _Update:
    """What is at one point: two factors and their scale, and what is beside them."""

    a: Tensor
    b: Tensor
    scale: float
    beside: Mapping[str, Tensor]


def low_rank(writing: Writing, said: Mapping[str, Said]) -> list[Child]:
    """The one config of these points; their tensors are written on the way."""
    kinds = sorted({_kind(writing, one, id) for id, one in said.items()})
    if len(kinds) > 1:
        raise writing.refused(f"has one of LoRA's kind in an adapter, and this one has {', '.join(kinds)}")
    kind = kinds[0]
    family = writing.places.family
    locations = {family.intermediate: "intermediate_lora", family.output: "output_lora"}
    roles = [f"{where}.{letter}" for where in ("attn", "cross") for letter in _LETTERS]
    at: dict[tuple[str, int], str] = {}
    for id in said:
        role, block = writing.place(id, (*roles, *locations, _ALL))
        at[role, block.layer] = id
    layers = sorted({layer for _, layer in at})
    letters = [one for one in _LETTERS if any(role in (f"attn.{one}", f"cross.{one}", _ALL) for role, _ in at)]
    has = {flag: any(role == own for own, _ in at) for role, flag in locations.items()}
    own = [role for role in roles if role[-1] in letters] + [role for role, flag in locations.items() if has[flag]]
    updates = {
        (role, layer): update
        for role, layer in at
        for role, update in _updates(writing, said[at[role, layer]], at[role, layer], role, kind)
    }
    blocks = [block for block in writing.places.blocks if block.layer in layers]
    for block in blocks:
        for role in own:
            point = writing.places.point(role, block)
            if point is not None and (role, block.layer) not in updates:
                updates[role, block.layer] = _idle(writing, point, kind)
    fields = _common(writing, updates, kind, said)
    for block in blocks:
        _put(writing, block, {role: updates[role, block.layer] for role in own if (role, block.layer) in updates}, kind)
    everywhere = [role for role in own if role in ("mlp.up", "mlp.down") or role in (*roles, *FUSED_PARTS)]
    where = {
        "selfattn_lora": bool(letters),
        **has,
        "attn_matrices": letters or ["q", "v"],
        "leave_out": writing.left_out(layers, everywhere),
    }
    return [Child("lora", {**fields, **where})]


def _kind(writing: Writing, one: Said, id: str) -> str:
    """The type, where its options are what the tool has: lora, dora, ia3 or gated."""
    if one.type == "union":
        parts = one.config["parts"]
        if one.config["gating"] != "sequence" or [part["type"] for part in parts] != ["lora"]:
            raise writing.refused("has gates that are averaged over the sequence, on LoRA", id)
        return "gated"
    if one.type == _SCALE and "scale" not in one.tensors:
        raise writing.refused("has factors of another kind than this (IA)3", id)
    return one.type


def _updates(writing: Writing, one: Said, id: str, role: str, kind: str) -> list[tuple[str, _Update]]:
    """What is said at a point, by role: at a layer that is fused it is what its three parts have."""
    point = writing.point(id)
    made = _update(writing, one, point, kind)
    if role != _ALL:
        return [(role, made)]
    pieces = [piece.contiguous() for piece in made.b.chunk(3)]
    sides = {name: tensor.chunk(3) for name, tensor in made.beside.items()}
    if kind == "gated":
        sides = {name: (tensor,) * 3 for name, tensor in made.beside.items()}
    return [
        (part, dataclasses.replace(made, b=piece, beside={name: own[i] for name, own in sides.items()}))
        for i, (part, piece) in enumerate(zip(FUSED_PARTS, pieces, strict=True))
    ]


def _update(writing: Writing, one: Said, point: InjectionPoint, kind: str) -> _Update:
    if kind == _SCALE:
        module = module_of(one, point, writing.where)
        if type(module).__name__ == "ScaledInput":
            raise writing.refused("scales what layers give, not what they take: set scale_input=None", point.id)
        return _Update(one.tensors["scale"].new_zeros(1, 0), one.tensors["scale"].reshape(-1, 1), 1.0, {})
    if kind == "gated":
        inner = {name.removeprefix("members.0."): t for name, t in one.tensors.items() if name.startswith("members.")}
        config = {key: value for key, value in one.config["parts"][0]["config"].items() if key != "settings"}
        config |= one.config["parts"][0]["config"].get("settings", {}).get(point.id, {})
        lora = Said("lora", config, inner)
        beside = {"gate.weight": one.tensors["gates.0.weight"], "gate.bias": one.tensors["gates.0.bias"]}
    else:
        lora, beside = one, {}
    if kind == "dora":
        return _dora(writing, one, point)
    factors = factors_of(lora, point, writing.where)
    if factors is None or factors.A.ndim != 2:
        raise writing.refused("has LoRA of linear layers alone", point.id)
    return _Update(factors.A, factors.B, factors.scale, beside)


def _dora(writing: Writing, one: Said, point: InjectionPoint) -> _Update:
    config, module = one.config, module_of(one, point, writing.where)
    a, b, magnitude = (one.tensors.get(name) for name in ("A", "B", "magnitude"))
    if config["over"] != "inputs" or set(one.tensors) != {"A", "B", "magnitude"}:
        raise writing.refused("has DoRA over the inputs of each output, without a start to take off", point.id)
    assert a is not None
    assert b is not None
    assert magnitude is not None
    if point.form == "linear_t":
        raise writing.refused("fails itself on DoRA at layers of GPT-2's kind", point.id)
    if point.layout.bias and not config["scale_bias"]:
        raise writing.refused(
            "scales a layer's bias by DoRA's factors too, and this one is not to: scale_bias", point.id
        )
    scale = float(module.scale)  # type: ignore[arg-type]
    if config["plain_norm"] and scale != 1:
        return _Update(a, b, scale, {"m.weight": magnitude.reshape(-1, 1), "plain": magnitude.new_ones(1)})
    return _Update(a, _times(b, scale), 1.0, {"m.weight": magnitude.reshape(-1, 1)})


def _idle(writing: Writing, point: InjectionPoint, kind: str) -> _Update:
    """What changes nothing, for a layer that the config includes with others: of rank 0, which gets zeros."""
    ones = kind == _SCALE
    b = torch.ones(point.out_features, 1) if ones else torch.zeros(point.out_features, 0)
    a = torch.zeros(0, point.in_features)
    if kind == "gated":
        gate = {"gate.weight": torch.zeros(point.in_features), "gate.bias": torch.zeros(())}
        return _Update(a, b, 1.0, gate)
    if kind != "dora":
        return _Update(a, b, 1.0, {})
    model = writing.points.model
    try:
        assert model is not None
        norms = model.values(point)[0].flatten(1).norm(dim=1)
    except IncompatibleTargetError as error:
        raise writing.refused(
            "needs DoRA's magnitudes at every layer of a kind, and the base has none", point.id
        ) from error
    return _Update(a, b, 1.0, {"m.weight": norms.reshape(-1, 1).float()})


# -- one config for all -----------------------------------------------------------------------------------------------


def _common(
    writing: Writing, updates: dict[tuple[str, int], _Update], kind: str, said: Mapping[str, Said]
) -> dict[str, Any]:
    """The fields; the updates become what they speak of: of one rank, with one scale."""
    if kind == _SCALE:
        own = {"composition_mode": "scale", "init_weights": "ia3"}
        return {"r": 1, "alpha": 1, "dropout": 0.0, **own}
    rank = max(len(update.a) for update in updates.values())
    scales = {update.scale for update in updates.values() if len(update.a)}
    scale = next(iter(scales)) if len(scales) == 1 and kind != "gated" else 1.0
    plain = {"plain" in update.beside for update in updates.values() if len(update.a)}
    if True in plain and (len(plain) > 1 or len(scales) > 1):
        raise writing.refused("has one scale for all of DoRA, and the norms here depend on it")
    for place, update in updates.items():
        more = rank - len(update.a)
        a = torch.cat([update.a, update.a.new_zeros(more, update.a.shape[1])]) if more else update.a
        b = torch.cat([update.b, update.b.new_zeros(len(update.b), more)], 1) if more else update.b
        b = b if update.scale == scale or not len(update.a) else _times(b, update.scale / scale)
        beside = {name: tensor for name, tensor in update.beside.items() if name != "plain"}
        updates[place] = _Update(a, b, scale, beside)
    configs = [one.config["parts"][0]["config"] if kind == "gated" else one.config for one in said.values()]
    dropped = [config.get("dropout", 0.0) for config in configs]
    if len(set(dropped)) > 1 or any(config.get(n) for config in configs for n in ("rank_dropout", "module_dropout")):
        writing.note("the tool has one dropout, of what LoRA takes: others are not in the file")
    return {
        "r": rank,
        "alpha": number(scale * rank),
        "dropout": float(dropped[0]),
        "use_gating": kind == "gated",
        "use_dora": kind == "dora",
    }


def _times(tensor: Tensor, factor: float) -> Tensor:
    """A product that loses no more than float32 does."""
    return tensor if factor == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


def _put(writing: Writing, block: Block, updates: Mapping[str, _Update], kind: str) -> None:
    """The tensors of a block; the three parts of one layer stand one behind the other."""
    groups: list[tuple[str, Sequence[_Update]]] = []
    rest = dict(updates)
    if FUSED in block.stack.names:
        inside = [rest.pop(role) for role in FUSED_PARTS if role in rest]
        groups += [(FUSED, inside)] if inside else []
    groups += [(role, [update]) for role, update in rest.items()]
    for role, own in groups:
        tensors = {"lora_B": torch.cat([update.b for update in own])}
        if kind != _SCALE:
            tensors["lora_A"] = torch.cat([update.a for update in own])
        if kind == "dora":
            tensors["m.weight"] = torch.cat([update.beside["m.weight"] for update in own])
        elif kind == "gated":
            tensors["gate.weight"] = torch.stack([update.beside["gate.weight"].reshape(-1) for update in own])
            tensors["gate.bias"] = torch.stack([update.beside["gate.bias"].reshape(()) for update in own])
        writing.put("loras", role, block, tensors)
