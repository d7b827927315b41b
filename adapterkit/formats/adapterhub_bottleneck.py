"""Bottlenecks of AdapterHub, sequential and parallel, as `bottleneck`; those of Kronecker products as `compacter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Part
from adapterkit.errors import InvalidHeaderError, MissingKeysError
from adapterkit.formats.adapterhub_config import Fields
from adapterkit.formats.adapterhub_names import HIDDEN, Block
from adapterkit.formats.adapterhub_read import Found, Reading, activation, invertible, part

PLACES = {"mh_adapter": "attn", "output_adapter": "mlp", "cross_adapter": "cross"}
"""The config's word for a place -> the role there."""
INITS = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
_LOST = (
    "what all layers share is not in the file: the tool does not save it of a model without a head. The file is beyond "
    "repair; save the adapter again from a model that has one"
)


def bottlenecks(reading: Reading, fields: Fields) -> list[Part]:
    """The bottlenecks that a config asks for, and the transform of the embedded sequence beside them."""
    parts: list[Part] = []
    norms_after = any(_has_norm(reading, block) for block in reading.places.blocks)
    roles = [role for name, role in PLACES.items() if fields[name]]
    config = _config(fields, norms_after=norms_after, roles=roles)
    points: dict[str, Found] = {}
    settings: dict[str, dict[str, Any]] = {}
    whole = not fields["original_ln_after"] and not fields["is_parallel"]
    for role in roles:
        for block, key in reading.places.each(role, fields["leave_out"]):
            point = reading.places.point(HIDDEN, block) if whole and norms_after else None
            key = point.id if point else key
            points[key] = reading.taken(reading.keys.take("adapters", role, block))
            settings[key] = _width(fields, block)
    if points:
        made = _compacter if fields["phm_layer"] else _bottleneck
        parts.append(made(reading, fields, config, points, settings))
    return [*parts, *invertible(reading, fields)]


def _has_norm(reading: Reading, block: Block) -> bool:
    """Whether a block ends with a norm over the residual sum."""
    point = reading.places.point("mlp", block)
    return point is not None and point.layout.norm_out is not None


def _config(fields: Fields, *, norms_after: bool, roles: list[str]) -> dict[str, Any]:
    """Our config for one of the tool's, without widths."""
    before, parallel = fields["original_ln_before"] and not fields["is_parallel"], fields["is_parallel"]
    config: dict[str, Any] = {
        "form": "parallel" if parallel else "pfeiffer" if before else "houlsby",
        "residual": "sublayer" if parallel else _residual(fields, norms_after),
        "activation": activation(fields),
        "scaling": fields["scaling"] if isinstance(fields["scaling"], str) else float(fields["scaling"]),
        "init": INITS.get(fields["init_weights"], "bert"),
        "norm_before": fields["ln_before"],
        "norm_after": _norm_after(fields),
        "gating": "sequence" if fields["use_gating"] else False,
        "dropout": float(fields["dropout"]),
        "drop_path": 0.0 if parallel else float(fields["stochastic_depth"]),
    }
    if fields["original_ln_after"]:
        return config
    return _without_the_add(fields, config, norms_after, roles)


def _residual(fields: Fields, norms_after: bool) -> str:
    given = fields["residual_before_ln"]
    if given is True or (given is False and not fields["original_ln_before"]):
        return "sublayer"  # without a norm in front, what the network sees is the sublayer's output
    if given == "post_add" and not (fields["original_ln_before"] and norms_after):
        raise fields.refused("cannot be read: the tool itself fails on it here", "residual_before_ln")
    return "sum" if given == "post_add" else "input"


def _norm_after(fields: Fields) -> str | None:
    if not fields["ln_after"]:
        return None
    return "sum" if fields["adapter_residual_before_ln"] and not fields["is_parallel"] else "network"


def _without_the_add(fields: Fields, config: dict[str, Any], norms_after: bool, roles: list[str]) -> dict[str, Any]:
    """The config where nothing is added behind the network: it must hold the sublayer's input already.

    That is `A(h) + h` with `h = norm_out(s + x)`. Behind a norm it is what acts on the whole block's output; without
    one, `s + A(s + x)` before the block adds x.
    """
    holds = fields["original_ln_before"] and not fields["is_parallel"] and config["residual"] == "input"
    if not holds or (norms_after and roles != ["mlp"]) or config["norm_after"] == "sum":
        raise fields.refused("without a residual that holds the sublayer's input cannot be read", "original_ln_after")
    return {**config, "form": "houlsby" if norms_after else "pfeiffer", "residual": "sublayer"}


def _width(fields: Fields, block: Block) -> dict[str, Any]:
    """The settings of a block: the tool's hidden width is the features // the factor."""
    factor = fields["reduction_factor"]
    if not isinstance(factor, Mapping):
        return {"reduction": float(factor)}
    own = factor.get(str(block.layer), factor.get("default"))
    if own is None:
        told = f"has no layer {block.layer}, and no default"
        raise InvalidHeaderError(told, fields.where, "config.reduction_factor")
    return {"reduction": float(own)}


_BEHIND = {
    "adapter_norm_after.weight": "norm_after.weight",
    "adapter_norm_after.bias": "norm_after.bias",
    "adapter_norm_before.weight": "norm_before.weight",
    "adapter_norm_before.bias": "norm_before.bias",
    "gate.weight": "gate.weight",
    "gate.bias": "gate.bias",
}


def _down(fields: Fields) -> str:
    """Where the first layer is: a norm in front of it takes its number, and is in the file a second time."""
    return "adapter_down.1" if fields["ln_before"] else "adapter_down.0"


def _beside(found: Found, fields: Fields) -> dict[str, Tensor]:
    """What a network has beside its two layers."""
    own = found.renamed(_BEHIND)
    if fields["ln_before"]:
        found.pass_over("adapter_down.0.weight", "adapter_down.0.bias")
    if fields["scaling"] == "learned":
        own["scale"] = found("scaling", 1).reshape(())
    elif fields["scaling"] == "channel":
        own["scale"] = found("scaling", None)
    return own


def _bottleneck(
    reading: Reading,
    fields: Fields,
    config: dict[str, Any],
    points: Mapping[str, Found],
    settings: Mapping[str, Mapping[str, Any]],
) -> Part:
    names = {
        f"{place}.{what}": f"{layer}.{what}"
        for place, layer in ((_down(fields), "down"), ("adapter_up", "up"))
        for what in ("weight", "bias")
    }
    made = {key: {**found.renamed(names), **_beside(found, fields)} if found else None for key, found in points.items()}
    return part("bottleneck", config, made, settings=settings)


# -- Kronecker products -----------------------------------------------------------------------------------------------


def _compacter(
    reading: Reading,
    fields: Fields,
    config: dict[str, Any],
    points: Mapping[str, Found],
    settings: Mapping[str, Mapping[str, Any]],
) -> Part:
    shared = reading.taken(reading.keys.take_whole("shared_parameters"))
    if not shared and (fields["shared_phm_rule"] or fields["shared_W_phm"]) and any(points.values()):
        raise MissingKeysError(_LOST, reading.where, "shared_parameters.phm_rule")
    own = {**config, "n": fields["phm_dim"], "shared_rule": fields["shared_phm_rule"]}
    own.pop("init")
    made = {
        key: {**_products(found, shared, fields), **_beside(found, fields)} if found else None
        for key, found in points.items()
    }
    ranks = {tensors["down.left"].shape[-1] for tensors in made.values() if tensors}
    own["rank"] = ranks.pop() if len(ranks) == 1 else fields["phm_rank"]
    rule = {"rule": _rule(shared, fields)} if fields["shared_phm_rule"] and shared else None
    if not fields["learn_phm"]:
        reading.note("learn_phm=False: the matrices S train here as all others do")
    if fields["shared_W_phm"]:
        reading.note("shared_W_phm=True: every layer has a copy of the weights that all shared")
    if fields["factorized_phm_rule"]:
        reading.note("factorized_phm_rule=True: the matrices S are read as their products")
    return part("compacter", own, made, settings=settings, shared=rule)


def _products(found: Found, shared: Found, fields: Fields) -> dict[str, Tensor]:
    """The weights of both layers as L and R, and what is beside them."""
    tensors: dict[str, Tensor] = {}
    for place, layer in ((_down(fields), "down"), ("adapter_up", "up")):
        of, name = (shared, f"W_{layer}") if fields["shared_W_phm"] else (found, f"{place}.W")
        n = fields["phm_dim"]
        if fields["factorized_phm_W"]:
            rank = fields["phm_rank"]
            left, right = of(f"{name}_left", n, None, rank), of(f"{name}_right", n, rank, None)
        else:
            left, right = _factors(of(name, n, None, None))
        tensors |= {f"{layer}.left": left, f"{layer}.right": right}
        if fields["phm_bias"]:
            tensors[f"{layer}.bias"] = found(f"{place}.b", None)
        else:
            tensors[f"{layer}.bias"] = left.new_zeros(n * right.shape[-1])
        if not fields["shared_phm_rule"]:
            tensors[f"{layer}.rule"] = _rule(found, fields, f"{place}.")
    return tensors


def _factors(weights: Tensor) -> tuple[Tensor, Tensor]:
    """L and R of weights [n, in, out] that are no product: one of them is the identity, so that both are small."""
    n, inputs, outputs = weights.shape
    identity = torch.eye(min(inputs, outputs), dtype=weights.dtype).expand(n, -1, -1).contiguous()
    return (weights, identity) if outputs <= inputs else (identity, weights)


def _rule(found: Found, fields: Fields, prefix: str = "") -> Tensor:
    """The matrices S [n, n, n]."""
    n = fields["phm_dim"]
    if not fields["factorized_phm_rule"]:
        return found(f"{prefix}phm_rule", n, n, n)
    return found(f"{prefix}phm_rule_left", n, n, 1) @ found(f"{prefix}phm_rule_right", n, 1, n)
