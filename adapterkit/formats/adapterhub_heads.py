"""Heads that AdapterHub saves beside an adapter: those of the model that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit.checkpoint import Part
from adapterkit.errors import IncompatibleTargetError
from adapterkit.formats.adapterhub_keys import parsed
from adapterkit.formats.source import Source
from adapterkit.kernels.weights import canonical
from adapterkit.points import ParameterPoint, Points

FILE = "head_config.json"
WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_FLEXIBLE = "heads"


@dataclass
class Head:
    """What became of a head.

    Attributes:
        parts: The head, as values of the model's own parameters; nothing where they are what the model has.
        matched, unmatched: Its keys.
        notes: For the report.
    """

    parts: list[Part] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave(self, keys: Sequence[str], told: str) -> None:
        """Keys that belong to nothing here, and why."""
        self.unmatched += keys
        if told not in self.notes:
            self.notes.append(told)


def head_of(weights: Source, points: Points, taken: Sequence[str]) -> Head:
    """A head's tensors where the model has that head.

    Args:
        weights: The file.
        points: The model's.
        taken: Ids of points at which the adapter acts: a head's own values are not beside it.
    """
    made, modules = Head(), dict[str, dict[str, str]]()
    for key in weights.entries:
        path, _, name = key.rpartition(".")
        if parsed(key):  # the tool puts prefixes of some models into the head's file as well
            made.matched.append(key)
        else:
            modules.setdefault(path, {})[name] = key
    tensors = weights.tensors([key for own in modules.values() for key in own.values()])
    here = {point.path: point for point in points if isinstance(point, ParameterPoint) and point.span is None}
    values: dict[str, dict[str, Tensor]] = {}
    for path, own in modules.items():
        point = here.get(path)
        if point is not None:
            _compare(made, point, own, tensors, points, values, taken)
        elif _is_again(path, own, modules, tensors):
            made.matched += own.values()
        elif not path and all(not tensors[key].any() for key in own.values()):
            made.matched += own.values()  # BART's `final_logits_bias`, a buffer of zeros
        else:
            kind = "one of AdapterHub's own classes" if path.split(".")[0] == _FLEXIBLE else "another class"
            made.leave(list(own.values()), f"the head is of {kind} of models, and this model has no such layers")
    if values:
        made.parts.append(Part("trainable", {"part": "all"}, values, {key: _part(own) for key, own in values.items()}))
    return made


def _part(own: Mapping[str, Tensor]) -> dict[str, str]:
    return {} if "bias" in own else {"part": "weight"}


def _is_again(
    path: str, own: Mapping[str, str], modules: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether these are tied to what a module below has: a decoder's bias stands a second time above it."""
    below = [keys for other, keys in modules.items() if other.startswith(f"{path}.")]
    return all(
        any(name in keys and torch.equal(tensors[keys[name]], tensors[key]) for keys in below)
        for name, key in own.items()
    )


def _compare(
    made: Head,
    point: ParameterPoint,
    own: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    points: Points,
    values: dict[str, dict[str, Tensor]],
    taken: Sequence[str],
) -> None:
    names = {point.layout.parameter: "weight"} | ({point.layout.bias_parameter: "bias"} if point.layout.bias else {})
    found = {names[name]: tensors[key] for name, key in own.items() if name in names}
    weight = found.get("weight")
    if set(own) != set(names) or weight is None or canonical(weight, point.layout).shape != point.shape:
        made.leave(list(own.values()), f"the head has another shape than the model's at {point.id}")
        return
    found["weight"] = canonical(weight, point.layout).contiguous()
    if _is_the_models(point, found, points):
        made.matched += own.values()
        made.notes += (
            [] if made.parts or "the head is the model's own" in made.notes else ["the head is the model's own"]
        )
    elif point.id in taken:
        made.leave(list(own.values()), f"the adapter acts at {point.id}, where the head has values of its own")
    else:
        made.matched += own.values()
        values[point.id] = found


def _is_the_models(point: ParameterPoint, found: Mapping[str, Tensor], points: Points) -> bool:
    if points.model is None:
        return False
    try:
        weight, bias = points.model.values(point)
    except IncompatibleTargetError:  # quantized, or not here
        return False
    pairs = [(weight, found["weight"]), *([(bias, found["bias"])] if bias is not None else [])]
    return all(torch.equal(base.to(own.dtype).cpu(), own) for base, own in pairs)
