"""AdapterFusion and heads in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Said
from adapterkit.errors import IncompatibleTargetError
from adapterkit.formats.adapterhub_keys import OUTPUTS
from adapterkit.formats.adapterhub_schemas import FUSION
from adapterkit.formats.adapterhub_writing import VERSION, Writing
from adapterkit.points import InjectionPoint


def fusion(writing: Writing, said: Mapping[str, Said], last: Mapping[str, Said] | None) -> dict[str, Any]:
    """The config of a fusion, whose tensors are written on the way.

    Args:
        writing: Where to.
        said: What it is, by point.
        last: What its last part is, by point; None where that is not at hand.
    """
    config = next(iter(said.values())).config
    names = ("parts", "value", "query", "dropout")
    if any(one.config[name] != config[name] for one in said.values() for name in names):
        raise writing.refused("has one kind of fusion in an adapter")
    for id, one in said.items():
        role, block = writing.place(id, OUTPUTS)
        if config["query"] == "sum":
            _check_query(writing, id, last)
        heat = one.config["temperature"]
        own = one.tensors
        tensors = {name: tensor if heat == 1 else tensor / heat for name, tensor in own.items() if "query." in name}
        tensors["key.weight"] = own["key.weight"]
        tensors["key.bias"] = own["query.bias"].new_zeros(len(own["key.weight"]))
        if config["value"]:
            tensors["value.weight"] = own["value"]
        writing.put("adapter_fusion_layer", role, block, tensors)
    given = config["dropout"]
    fields = {
        **FUSION,
        "value": config["value"],
        "query_before_ln": config["query"] == "output",
        "regularization": bool(config["regularisation"]),
        "dropout_prob": given or None,
    }
    about = {**writing.about(), "config": dict(sorted(fields.items())), "name": writing.name}
    return about | {"adapter_names": list(config["parts"])}


def _check_query(writing: Writing, id: str, last: Mapping[str, Said] | None) -> None:
    """The tool makes queries from what the last part sees; that is the normed sum of `query="sum"` for Pfeiffer's."""
    if last is None:
        writing.note(
            "the tool makes queries from what the last part sees: it must be Pfeiffer's, as query='sum' has it"
        )
    elif id not in last or last[id].config.get("form") != "pfeiffer":
        raise writing.refused("makes queries from what the last part sees: query='part'", id)


def heads(writing: Writing, said: Mapping[str, Said]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of the model's head, where an adapter has values of its own for it."""
    tensors: dict[str, Tensor] = {}
    bare = not writing.base and str(writing.about()["model_class"]).endswith("Model")
    inside = {stack.path.split(".")[0] for stack in writing.places.family.stacks}
    for id, one in said.items():
        point, config = writing.point(id), one.config
        begins = point.path.split(".")[0]
        if bare or point.role.split(".")[0] != "head" or begins in inside or f"{begins}." == writing.base:
            raise writing.refused("saves the model's head, and no other weights of its own", id)
        if config["rows"] is not None or config["outputs"] is not None or set(one.tensors) - {"weight", "bias"}:
            raise writing.refused("saves whole layers of the model's own head", id)
        if (config["part"] == "bias" and not config["absolute"]) or point.form not in ("linear", "norm"):
            raise writing.refused("saves values of a head, and not changes of them: part='all'", id)
        if _is_tied(writing, point):
            raise writing.refused("changes embeddings with the head that is tied to them", id)
        words = {"weight": point.layout.parameter, "bias": point.layout.bias_parameter or "bias"}
        tensors |= {f"{point.path}.{words[name]}": tensor for name, tensor in one.tensors.items()}
    labels = writing.model.config.get("label2id")
    about = {**writing.about(), "config": None, "name": None, "version": VERSION, "label2id": labels}
    return about | {"num_labels": len(labels) if isinstance(labels, Mapping) else None}, tensors


def _is_tied(writing: Writing, point: InjectionPoint) -> bool:
    """Whether a head has the values of the embedded tokens: where the tool loads one, it loads the other."""
    model, shape = writing.points.model, (point.in_features, point.out_features)
    embedded = [one for one in writing.points if one.role == "embed.tokens" and one.shape == shape]
    try:
        return model is not None and any(
            torch.equal(model.values(point)[0], model.values(one)[0].mT) for one in embedded
        )
    except IncompatibleTargetError:  # quantized, or not here
        return bool(embedded) and bool(writing.model.config.get("tie_word_embeddings"))
