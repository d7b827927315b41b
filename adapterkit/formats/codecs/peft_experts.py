"""LoRA on a stack of experts' weights in one parameter: A [experts * rank, in], B [out, rank * experts]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapterkit.contract.codec import Context, Place
from adapterkit.contract.factors import Factors
from adapterkit.errors import ShapeMismatchError
from adapterkit.formats.low_rank import joined


def one(a: Tensor, b: Tensor, place: Place, context: Context) -> tuple[Tensor, Tensor]:
    """The factors of one expert, [rank, in] and [out, rank].

    Args:
        a, b: Of all.
        place: The expert's; its layout has the place in the stack.
        context: Whose config has the rank.
    """
    rank = context.config.get("r") or 1
    index = place.point.layout.index
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or index >= a.shape[0] // rank:
        told = f"A is {tuple(a.shape)} and B {tuple(b.shape)}, for expert {index} of a rank of {rank}"
        raise ShapeMismatchError(told, context.where, place.point.path)
    experts = a.shape[0] // rank
    return a.unflatten(0, (experts, rank))[index], b.unflatten(1, (rank, experts))[:, :, index]


def stacked(pairs: Sequence[tuple[Place, Factors]], context: Context) -> tuple[Tensor, Tensor, int, float]:
    """The factors of all experts, their rank and the scale on their product; zeros for experts without any."""
    first = pairs[0][0]
    experts = first.stack
    own: dict[int, list[tuple[Place, Factors]]] = {}
    for place, factors in pairs:
        own.setdefault(place.point.layout.index, []).append((place, factors))
    each = {index: joined(some) for index, some in own.items()}
    rank, scale = max(len(a) for a, _, _ in each.values()), next(iter(each.values()))[2]
    a_all = pairs[0][1].A.new_zeros(experts, rank, first.shape[1])
    b_all = a_all.new_zeros(first.shape[0], rank, experts)
    for index, (a, b, own_scale) in each.items():
        a_all[index, : len(a)] = a
        b_all[:, : len(a), index] = b if own_scale == scale else b * (own_scale / scale)
    context.config["target_parameters"] = {f"{first.point.path}.{first.point.layout.parameter}"}
    return a_all.flatten(0, 1), b_all.flatten(1), rank, scale
