"""What the codecs of PEFT's LoHa, LoKr and BOFT share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError, ShapeMismatchError


def scaled(rank: int, context: Context, place: Place) -> dict[str, Any]:
    """Rank, alpha and dropout of a module.

    Raises:
        ShapeMismatchError: The config has another rank.
    """
    wanted = context.config.get("r")
    if rank < 1 or (wanted is not None and wanted != rank):
        raise ShapeMismatchError(f"has rank {rank}, and the config {wanted}", context.where, place.point.path)
    dropout = context.config.get("module_dropout")
    own = {"module_dropout": 0.0 if place.point.is_read else dropout} if dropout else {}
    return {"rank": rank, "alpha": context.config.get("alpha", rank), **own}


def dropouts(said: Said) -> dict[str, Any]:
    """The dropout that PEFT has too."""
    dropout = said.config.get("module_dropout")
    return {"module_dropout": dropout} if dropout else {}


def kernel_core(core: Tensor, place: Place) -> Tensor:
    """A core [rank, rank, *kernel], without the axis that PEFT gives those of one axis."""
    return core.squeeze(-1) if core.ndim == len(place.shape) + 1 else core


def whole(said: Sequence[tuple[Place, Said]], name: str, context: Context) -> tuple[Place, Said]:
    """The one place of a layer that is written.

    Raises:
        CheckpointError: It is a part of a layer, or has options that PEFT's type has not.
    """
    place, one = said[0]
    if len(said) > 1 or not place.whole:
        told = f"{name} acts on a part of a fused projection, and PEFT's on all of it; native holds it"
        raise CheckpointError(told, context.where, place.point.path)
    if one.config.get("decompose"):
        told = f"PEFT has no {name} with a magnitude; native and lycoris hold it"
        raise CheckpointError(told, context.where, place.point.path)
    if one.config.get("dropout"):
        context.note(f"{name}: PEFT has no dropout of its input; it is left out, and changes training alone")
    return place, one
