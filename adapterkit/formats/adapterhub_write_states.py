"""Prefixes, prompts and edits of hidden states, as AdapterHub's configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract.codec import Said
from adapterkit.formats.adapterhub_config import Fields
from adapterkit.formats.adapterhub_keys import ATTENTIONS
from adapterkit.formats.adapterhub_names import HIDDEN
from adapterkit.formats.adapterhub_schemas import PREFIX
from adapterkit.formats.adapterhub_states import locations
from adapterkit.formats.adapterhub_write_bottleneck import activation
from adapterkit.formats.adapterhub_writing import Child, Writing
from adapterkit.formats.low_rank import module_of

_SHARED = {None: {}, "shared": {"shared_gating": True}, "separate": {"shared_gating": False}}


# -- prefixes ---------------------------------------------------------------------------------------------------------


def prefixes(writing: Writing, said: Mapping[str, Said]) -> list[Child]:
    """The one config of these attentions: in the tool one tensor holds the prefixes of all of a kind."""
    places = {id: writing.place(id, ATTENTIONS) for id in said}
    configs = [one.config for one in said.values()]
    config = configs[0]
    if any((own["length"], own["gating"]) != (config["length"], config["gating"]) for own in configs):
        raise writing.refused("has prefixes of one length in an adapter, gated alike")
    if any(own["padded"] for own in configs):
        raise writing.refused("does not count padding as positions: padded=False")
    relative = writing.places.family.relative
    for id, (role, _) in places.items():
        if said[id].config["counted"] != (relative and role == ATTENTIONS[0]):
            raise writing.refused("counts the positions of prefixes where they are relative (T5), and nowhere else", id)
    own = [block for role, block in places.values() if role == ATTENTIONS[0]]
    layers = sorted({block.layer for _, block in places.values()})
    fields: dict[str, Any] = {
        "flat": True,
        "prefix_length": config["length"],
        "use_gating": config["gating"] is not None,
        **_SHARED[config["gating"]],
        "encoder_prefix": len(writing.places.family.stacks) == 1
        or any(block.stack.prefix.startswith("encoder") for block in own),
        "cross_prefix": len(writing.places.family.stacks) == 1 or any(role != "attn.kv" for role, _ in places.values()),
    }
    every = _attentions(writing, {**fields, "leave_out": []})
    fields["leave_out"] = sorted({block.layer for block, _, _ in every} - set(layers))
    if {id for _, id, _ in _attentions(writing, fields)} != set(said):
        raise writing.refused("puts prefixes at every attention of a kind but for whole layers that are left out")
    if relative and fields["leave_out"]:
        raise writing.refused("drops the relative positions (of T5) in layers that are left out: every layer needs one")
    for location, role, attentions in locations(writing.places, Fields("prefix", {**PREFIX, **fields}, writing.where)):
        if attentions:
            _put(writing, said, location, role, {id: block for block, id in attentions})
    return [Child("prefix_tuning", fields)]


def _attentions(writing: Writing, fields: Mapping[str, Any]) -> list[tuple[Any, str, str]]:
    found = locations(writing.places, Fields("prefix", {**PREFIX, **fields}, writing.where))
    return [(block, id, role) for _, role, attentions in found for block, id in attentions]


def _put(writing: Writing, said: Mapping[str, Said], location: str, role: str, blocks: Mapping[str, Any]) -> None:
    """The keys and values of all attentions of a kind, flat; every one's gate."""
    states: list[Tensor] = []
    for id in blocks:
        module: Any = module_of(said[id], writing.point(id), writing.where)
        with torch.no_grad():
            keys, values = module.prefix()
        if keys.shape != values.shape or (states and states[0].shape[1:] != keys.shape):
            raise writing.refused("has keys and values of one width, the same in all layers", id)
        states.append(torch.stack([keys, values]))
    flat = torch.stack(states).permute(3, 0, 1, 2, 4).reshape(-1)  # [length, layers, keys or values, heads, head_dim]
    tensors = {f"{location}.control_trans": flat}
    writing.put_whole("prefix_tuning.prefix_tunings", tensors)
    first = writing.path(role, next(iter(blocks.values()))).removeprefix(writing.base)
    writing.put_whole(f"{first}.prefix_tuning.pool.prefix_tunings", tensors)
    for id, block in blocks.items():
        gate = {name: said[id].tensors[f"gate.{name}"] for name in ("weight", "bias") if said[id].config["gating"]}
        if gate:
            writing.put("prefix_gates", role, block, gate, "prefix_tuning")


def prompt(writing: Writing, said: Mapping[str, Said]) -> list[Child]:
    """Prompt tuning in front of the embedded sequence."""
    point = writing.places.outside("prompt", writing.places.family.stacks[0].site)
    (id, one), *others = said.items()
    family = writing.places.family
    if point is None or not family.embeds or not family.prompts or others or id != point.id:
        raise writing.refused("has one prompt, in front of the embedded sequence, for encoders alone", id)
    if one.config["padded"]:
        raise writing.refused("does not count padding as positions: padded=False", id)
    module: Any = module_of(one, point, writing.where)
    with torch.no_grad():
        rows = module.lengthen(torch.zeros(1, 1, point.out_features))
    writing.put_whole("prompt_tuning.prompt_tunings", {"prompt_embedding.weight": rows})
    writing.note("the tool returns a prompt's positions too, and a head that takes the first one takes a prompt's")
    return [Child("prompt_tuning", {"prompt_length": one.config["length"]})]


# -- edits ------------------------------------------------------------------------------------------------------------


def edits(writing: Writing, said: Mapping[str, Said]) -> list[Child]:
    """ReFT, the same in every layer that has one."""
    names = ("rank", "prefix", "suffix", "tied", "activation")
    configs = [one.config for one in said.values()]
    config = configs[0]
    if any(own[name] != config[name] for own in configs for name in names):
        raise writing.refused("has one kind of ReFT in an adapter")
    if any(own["form"] == "direft" for own in configs):
        raise writing.refused("does not say in a file that ReFT is DiReFT")
    prefix, suffix = config["prefix"] or 0, config["suffix"] or 0
    if not prefix and not suffix:
        raise writing.refused("edits the first and the last positions, and not all: set prefix or suffix")
    projections = {id: _projections(one) for id, one in said.items()}
    orthogonal = all(own is not None for own in projections.values())  # otherwise all are NoReFT: it says the same
    blocks = {id: writing.place(id, (HIDDEN,))[1] for id in said}
    units = {"first": 0} | ({"last": 1} if any(name.startswith("last.") for name in _tensors(said)) else {})
    for id, one in said.items():
        tensors: dict[str, Tensor] = {}
        for edit, unit in units.items():
            own, at = one.tensors, f"units.{unit}"
            tensors[f"{at}.learned_source.weight"] = own[f"{edit}.source"]
            tensors[f"{at}.learned_source.bias"] = own[f"{edit}.bias"]
            made = (projections[id] or {}).get(edit) if orthogonal else None
            tensors |= (
                {f"{at}.projection.weight": own[f"{edit}.projection"]}
                if made is None
                else {f"{at}.projection.parametrizations.weight.{name}": tensor for name, tensor in made.items()}
            )
        writing.put("refts", HIDDEN, blocks[id], tensors, "reft_layer")
    layers = sorted(block.layer for block in blocks.values())
    fields = {
        "layers": "all" if len(layers) == len(writing.places.blocks) else layers,
        "prefix_positions": prefix,
        "suffix_positions": suffix,
        "r": config["rank"],
        "orthogonality": orthogonal,
        "tied_weights": len(units) == 1,
        "dropout": 0.0,
        "non_linearity": None if config["activation"] is None else activation(config["activation"]),
    }
    return [Child("reft", fields)]


def _tensors(said: Mapping[str, Said]) -> Mapping[str, Tensor]:
    return next(iter(said.values())).tensors


def _projections(one: Said) -> dict[str, dict[str, Tensor]] | None:
    """The two tensors that torch's parametrization makes each projection from; None where no two of them do."""
    found: dict[str, dict[str, Tensor]] = {}
    for edit in ("first", "last"):
        rows = one.tensors.get(f"{edit}.projection")
        if rows is None:
            continue
        if one.config["form"] != "loreft":
            return None
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        layer: Any = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=wide.dtype)
        if not torch.allclose(wide @ wide.mT, torch.eye(len(wide), dtype=wide.dtype), atol=1e-5):
            return None
        layer.weight.data = wide
        made: Any = nn.utils.parametrizations.orthogonal(layer)
        made = made.parametrizations.weight
        found[edit] = {"original": made.original.detach(), "0.base": made[0].base.detach()}
        if not torch.allclose(layer.weight, wide, atol=1e-6):
            return None
    return found
