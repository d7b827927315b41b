"""What the codecs of updates with a rank, an alpha and perhaps a decomposition have alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError

ALPHA, DORA = "alpha", "dora_scale"


def update(
    type_name: str, rank: int, config: Mapping[str, Any], parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Said:
    """What an update's tensors say, with the alpha and the magnitudes beside them.

    Args:
        type_name: A type whose config is a `DenseConfig`.
        rank: What alpha is divided by.
        config: The type's own fields.
        parts: The update's tensors as its module names them.
        tensors: All that the file has for the module.
    """
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else None
    fields = {"rank": rank, "alpha": alpha, **config}
    if DORA not in tensors:
        return Said(type_name, fields, dict(parts))
    magnitude = tensors[DORA]
    side = side_of(magnitude)
    own = {f"update.{name}": tensor for name, tensor in parts.items()}
    return Said(type_name, {**fields, "decompose": side}, {**own, "magnitude": magnitude.flatten()})


def side_of(magnitude: Tensor) -> str:
    """Which axis of a weight has magnitudes: they keep that axis and have ones for the others."""
    return "output" if magnitude.ndim < 2 or magnitude.shape[1] == 1 else "input"


def require_whole(place: Place, what: str, context: Context) -> None:
    """Raises CheckpointError where the point is a part of the file's module, and the type has no parts."""
    if not place.whole:
        told = f"{what} is for the whole of a layer that is a part of one here; its parts cannot be told apart"
        raise CheckpointError(f"{told}. Merge it in the tool that made it, and extract a LoRA", context.where)


def only(said: Sequence[tuple[Place, Said]], context: Context) -> tuple[Place, Said]:
    """The one point of a module.

    Raises:
        CheckpointError: It has several, which the type's tensors cannot be joined from.
    """
    place, one = said[0]
    if len(said) > 1 or not place.whole:
        told = f"{one.type} at parts of a fused layer ({place.point.id}) cannot be said for the layer; native holds it"
        raise CheckpointError(told, context.where, place.point.id)
    return place, one


def described(place: Place, said: Said) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The update's own tensors, and the alpha and magnitudes that go with them in a file."""
    rank, alpha = said.config["rank"], said.config.get("alpha")
    beside = {ALPHA: torch.tensor(float(rank if alpha is None else alpha))}
    decompose = said.config.get("decompose")
    if decompose is None:
        return dict(said.tensors), beside
    own = {name.removeprefix("update."): t for name, t in said.tensors.items() if name != "magnitude"}
    shape = [1] * len(place.shape)
    shape[("output", "input").index(decompose)] = -1
    return own, {**beside, DORA: said.tensors["magnitude"].view(shape)}


def require_shape(got: Sequence[int], place: Place, context: Context) -> None:
    """Raises ShapeMismatchError for tensors that are for a weight of another shape."""
    if tuple(got) != place.shape:
        told = f"its tensors are for a weight of {tuple(got)}, and the model's is {place.shape}"
        raise ShapeMismatchError(told, context.where, place.point.path)
