"""Bottlenecks, those of Kronecker products, and invertible adapters, as AdapterHub's bottleneck configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Said
from adapterkit.formats.adapterhub_bottleneck import INITS, PLACES
from adapterkit.formats.adapterhub_names import HIDDEN
from adapterkit.formats.adapterhub_writing import Child, Writing, factor
from adapterkit.points import InjectionPoint

_FLAGS = {role: flag for flag, role in PLACES.items()}
_INITS = {own: name for name, own in INITS.items()}
ACTIVATIONS = {"silu": "swish", "leaky_relu": "leakyrelu", "identity": "linear"}
"""What the tool calls an activation, where that is another word."""
_BESIDE = {
    "norm_after.weight": "adapter_norm_after.weight",
    "norm_after.bias": "adapter_norm_after.bias",
    "norm_before.weight": "adapter_norm_before.weight",
    "norm_before.bias": "adapter_norm_before.bias",
    "gate.weight": "gate.weight",
    "gate.bias": "gate.bias",
}


def activation(name: str) -> str:
    """The tool's word for an activation."""
    return ACTIVATIONS.get(name, name)


def bottlenecks(writing: Writing, said: Mapping[str, Said], shared: Mapping[str, Tensor]) -> list[Child]:
    """The configs of these points; their tensors are written on the way."""
    groups: dict[str, dict[tuple[str, int], float]] = {}
    taken: set[tuple[str, int]] = set()
    for id, one in said.items():
        role, block = writing.place(id, (*_FLAGS, HIDDEN))
        fields = _fields(writing, one, id, role)
        role = "mlp" if role == HIDDEN else role
        place = (_FLAGS[role], block.layer)
        if place in taken:
            raise writing.refused(f"has one bottleneck at {role!r} of a block, and there are two", id)
        taken.add(place)
        width, tensors = _tensors(one, fields)
        given = one.config.get("reduction") if one.config.get("width") is None else None
        own = groups.setdefault(json.dumps(fields, sort_keys=True), {})
        own[place] = factor(writing.point(id).out_features, width, given)
        writing.put("adapters", role, block, tensors)
    children = [
        Child("bottleneck", {**json.loads(fields), **where})
        for fields, group in groups.items()
        for where in _places(writing, group)
    ]
    if sum(child.fields["phm_layer"] for child in children) > 1:
        raise writing.refused("has one kind of compacter in an adapter, and these differ from point to point")
    if shared:
        writing.put_whole("shared_parameters", {"phm_rule": shared["rule"]})
    return children


def _places(writing: Writing, group: Mapping[tuple[str, int], float]) -> list[dict[str, Any]]:
    """The flags, the layers and the factors of configs that say where a group of bottlenecks is: one, or one a flag."""
    layers: dict[int, dict[str, float]] = {}
    for (flag, layer), reduction in group.items():
        layers.setdefault(layer, {})[flag] = reduction
    flags = [flag for flag in PLACES if any(flag in own for own in layers.values())]

    def is_whole(layer: int) -> bool:
        has = {flag for flag in flags if writing.places.point(PLACES[flag], writing.places.blocks[layer])}
        return has == set(layers[layer]) and len(set(layers[layer].values())) == 1

    together = [flags] if all(is_whole(layer) for layer in layers) else [[flag] for flag in flags]
    found: list[dict[str, Any]] = []
    for own in together:
        factors = {layer: next(iter(by.values())) for layer, by in layers.items() if own[0] in by or len(own) > 1}
        if len(own) == 1:
            factors = {layer: by[own[0]] for layer, by in layers.items() if own[0] in by}
        usual = set(factors.values())
        found.append(
            {
                **{flag: flag in own for flag in PLACES},
                "leave_out": writing.left_out(list(factors), [PLACES[flag] for flag in own]),
                "reduction_factor": usual.pop() if len(usual) == 1 else {str(k): v for k, v in sorted(factors.items())},
            }
        )
    return found


# -- one bottleneck ---------------------------------------------------------------------------------------------------


def _fields(writing: Writing, one: Said, id: str, role: str) -> dict[str, Any]:
    """What the config says of one, but for where it is and how wide."""
    config, point = one.config, writing.point(id)
    if config["gating"] is True:
        raise writing.refused("has gates that are averaged over the sequence, and this one's are one a token", id)
    if config["hidden_dropout"]:
        writing.note(f"hidden_dropout={config['hidden_dropout']:g} is no option of the tool: it trains without")
    scaling = config["scaling"]
    fields = {
        **_form(writing, config, point, role),
        "non_linearity": activation(config["activation"]),
        "scaling": scaling if isinstance(scaling, str) else float(scaling),  # the tool refuses whole numbers
        "ln_before": config["norm_before"],
        "use_gating": config["gating"] == "sequence",
        "dropout": float(config["dropout"]),
        "phm_layer": one.type == "compacter",
    }
    if fields["is_parallel"] and config["drop_path"]:
        writing.note(f"drop_path={config['drop_path']:g} is no option of the tool's parallel bottlenecks")
    elif config["drop_path"]:
        fields["stochastic_depth"] = float(config["drop_path"])
    if one.type == "compacter":
        own = {"phm_dim": config["n"], "phm_rank": config["rank"], "shared_phm_rule": config["shared_rule"]}
        return {**fields, **own}
    return {**fields, "init_weights": _INITS.get(config["init"], "bert")}


def _form(writing: Writing, config: Mapping[str, Any], point: InjectionPoint, role: str) -> dict[str, Any]:
    """What the network sees, what it is added to, and what is normed behind it."""
    form, residual, norm = config["form"], config["residual"], config["norm_after"]
    layout = point.layout
    if form == "parallel_norm" and layout.norm_in is not None:
        raise writing.refused("shows a parallel bottleneck the stream as it is: form='parallel'", point.id)
    if role == HIDDEN:
        return _behind_block(writing, config, point)
    parallel = form.startswith("parallel")
    fields = {
        "is_parallel": parallel,
        "original_ln_before": form == "pfeiffer",
        "ln_after": norm is not None,
        "adapter_residual_before_ln": norm == "sum",
    }
    if parallel and (residual != "sublayer" or norm == "sum"):
        raise writing.refused("adds a parallel bottleneck to the sublayer's output, before any norm", point.id)
    if parallel or residual == "sublayer" or (residual == "input" and form == "houlsby"):
        return fields
    if form == "houlsby":
        raise writing.refused(f"cannot say residual={residual!r} with form='houlsby'", point.id)
    plain = residual == "input" or layout.norm_out is None  # without a norm s + x is what the network sees
    return {**fields, "residual_before_ln": False if plain else "post_add"}


def _behind_block(writing: Writing, config: Mapping[str, Any], point: InjectionPoint) -> dict[str, Any]:
    """Behind a whole block: the tool's way to say so, whether the block ends in a norm or not."""
    block = writing.place(point.id, (HIDDEN,))[1]
    last = writing.places.point("mlp", block)
    ends = last is not None and last.layout.norm_out is not None
    if config["form"] != "houlsby" or config["residual"] == "sum" or config["norm_after"] == "sum" or last is None:
        raise writing.refused("acts behind a block with form='houlsby' and residual='sublayer' alone", point.id)
    fields = {"is_parallel": False, "original_ln_before": True, "ln_after": config["norm_after"] is not None}
    fields |= {"adapter_residual_before_ln": False}
    return {**fields, "residual_before_ln": False, "original_ln_after": False} if ends else fields


def _tensors(one: Said, fields: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """The hidden width, and the tensors by the tool's names."""
    given = one.tensors
    tensors = {_BESIDE[name]: tensor for name, tensor in given.items() if name in _BESIDE}
    if "scale" in given:
        tensors["scaling"] = given["scale"].reshape(-1)
    down = "adapter_down.0"
    if fields["ln_before"]:  # the norm stands in front of the first layer, and in the file a second time
        tensors |= {f"{down}.{what}": given[f"norm_before.{what}"] for what in ("weight", "bias")}
        down = "adapter_down.1"
    names = {"down": down, "up": "adapter_up"}
    if not fields["phm_layer"]:
        tensors |= {f"{path}.{w}": given[f"{layer}.{w}"] for layer, path in names.items() for w in ("weight", "bias")}
        return len(given["down.weight"]), tensors
    words = {"left": "W_left", "right": "W_right", "bias": "b", "rule": "phm_rule"}
    for layer, path in names.items():
        own = {word: given[f"{layer}.{name}"] for name, word in words.items() if f"{layer}.{name}" in given}
        tensors |= {f"{path}.{word}": tensor for word, tensor in own.items()}
    return len(given["down.bias"]), tensors


# -- the embedded sequence --------------------------------------------------------------------------------------------


def invertible(
    writing: Writing, said: Mapping[str, Said], shared: Mapping[str, Tensor], children: Sequence[Child]
) -> list[Child]:
    """Joins an invertible adapter to the bottlenecks, or gives it a config of its own."""
    family = writing.places.family
    tokens = writing.places.outside("tokens", family.stacks[0].site if family.invertible else "")
    head = writing.places.outside("head") if family.hooked else None
    wanted = {point.id for point in (tokens, head) if point is not None}
    if tokens is None or not family.embeds or not family.inverts or set(said) != wanted:
        told = "has invertible adapters of embedded tokens alone, and undoes them before the head in Qwen alone"
        raise writing.refused(told, next(iter(set(said) ^ wanted), None))
    config = next(iter(said.values())).config
    if config["coupling"] != "additive":
        raise writing.refused("computes coupling='additive' alone", tokens.id)
    width, half = shared["F.down.weight"].shape
    reduction = half // width
    if half // reduction != width:
        raise writing.refused(f"has no invertible adapter of width {width} for {half} features", tokens.id)
    layers = {"down": 0, "up": 2}
    tensors = {
        f"{net}.{at}.{what}": shared[f"{net}.{layer}.{what}"]
        for net in "FG"
        for layer, at in layers.items()
        for what in ("weight", "bias")
    }
    writing.put_whole(f"{family.invertible}.invertible_adapters".lstrip("."), tensors)
    own = {"inv_adapter": "nice", "inv_adapter_reduction_factor": reduction}
    word = activation(config["activation"])
    same = next((child for child in children if child.fields["non_linearity"] == word), None)
    if same is not None:
        same.fields |= own
        return []
    empty = {**dict.fromkeys(PLACES, False), "reduction_factor": 16, "non_linearity": word, "phm_layer": False}
    return [Child("bottleneck", {**empty, "leave_out": [], **own})]


def accepted(writing: Writing, children: Sequence[Child]) -> None:
    """Lets several configs pass the tool's check, which compares their flags unless one leaves layers out."""
    for i, child in enumerate(children):
        for other in children[:i]:
            differ = all(child.fields[flag] != other.fields[flag] for flag in ("mh_adapter", "output_adapter"))
            if not differ and not child.fields["leave_out"] and not other.fields["leave_out"]:
                child.fields["leave_out"] = [len(writing.places.blocks)]  # a layer that there is not
