"""AdapterFusion in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Part
from adapterkit.errors import InvalidHeaderError, UnsupportedFileError, shown
from adapterkit.formats.adapterhub_config import Fields, text_of
from adapterkit.formats.adapterhub_keys import OUTPUTS
from adapterkit.formats.adapterhub_read import Found, Reading, part

FILE = "adapter_fusion_config.json"
_MAX_PARTS = 64


def names_of(value: Mapping[str, Any], where: object) -> list[str]:
    """The adapters that a fusion combines.

    Raises:
        InvalidHeaderError: That is no list of names.
    """
    names = value.get("adapter_names", text_of(value, "name", where))
    listed = names.split(",") if isinstance(names, str) else names
    if (
        not isinstance(listed, list)
        or not 1 <= len(listed) <= _MAX_PARTS
        or not all(isinstance(name, str) and name for name in listed)
    ):
        raise InvalidHeaderError(f"must be a list of names, not {shown(names)}", where, "adapter_names")
    return listed


def fusion(reading: Reading, fields: Fields, names: list[str]) -> list[Part]:
    """What a fusion's file holds; the points are those that it has tensors for."""
    if fields["residual_before"]:
        raise fields.refused("cannot be read: no type here adds the residual to the values", "residual_before")
    if not (fields["query"] or fields["key"] or fields["value"]):
        raise UnsupportedFileError("learns neither queries, keys nor values", fields.where, "config")
    if fields["temperature"]:
        reading.note("temperature=True: the tool lowers it from 50 to 1 in a thousand calls; it is read as 1")
    reading.note(
        "the file does not say what its parts are: the tool adds to the sublayer's output what bottlenecks behind it "
        "give, with the residual and norm of the last one"
    )
    points: dict[str, dict[str, Tensor] | None] = {}
    for role in OUTPUTS:
        for block, key in reading.places.each(role):
            found = reading.taken(reading.keys.take("adapter_fusion_layer", role, block))
            if found:
                points[key] = _attention(reading, found, fields)
    config: dict[str, Any] = {
        "parts": names,
        "value": fields["value"],
        "query": "output" if fields["query_before_ln"] else "part",
        "dropout": float(fields["dropout_prob"] or 0.0),
        "regularisation": 0.01 if fields["regularization"] else 0.0,
    }
    return [part("fuse", config, points)] if points else []


def _attention(reading: Reading, found: Found, fields: Fields) -> dict[str, Tensor]:
    """The tensors at one point. What is not learnt is the identity; a key's bias moves all logits alike."""
    own: dict[str, Tensor] = {}
    for name in ("query", "key"):
        if fields[name]:
            own[f"{name}.weight"] = found(f"{name}.weight", None, None)
    features = next((one.shape[0] for one in own.values()), None)
    if fields["value"]:
        own["value"] = found("value.weight", features, features)
        features = len(own["value"])
    assert features is not None
    for name in ("query", "key"):
        own.setdefault(f"{name}.weight", torch.eye(features))
    own["query.bias"] = found("query.bias", features) if fields["query"] else torch.zeros(features)
    found.pass_over("key.bias")
    return own
