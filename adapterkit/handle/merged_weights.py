"""What a module's weight and bias are with adapters in them, in its own layout and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.engine.folding import Part, fold
from adapterkit.errors import NotMergeableError
from adapterkit.kernels.finite import not_finite
from adapterkit.kernels.weights import canonical, layer_handler, stored_weight
from adapterkit.points import WeightLayout


@dataclass
class Target:
    """One parameter of one module, and what is to be folded into it: the parts of each matrix that it holds.

    `same_as` is another one whose merged weight is this one's too: the weight is tied, and what acts is one in both.
    """

    module: nn.Module
    path: str
    layout: WeightLayout
    matrices: dict[int | None, dict[str, Part]] = field(default_factory=dict)
    same_as: Target | None = None

    @property
    def keys(self) -> str:
        """The ids of the points, for errors."""
        keys = [key for parts in self.matrices.values() for key in parts]
        return ", ".join(keys[:5]) + (f", and {len(keys) - 5} more" if len(keys) > 5 else "")


def share_weights(targets: Mapping[tuple[int, str], Target], said: Mapping[tuple[int, str], object]) -> None:
    """Finds those of one parameter in which the same acts.

    Args:
        targets: By their modules and the parameters' names.
        said: What acts in each, by the same keys: equal where it is one.
    """
    first: dict[int, list[tuple[int, str]]] = {}
    for key, target in targets.items():
        parameter = target.module._parameters.get(target.layout.parameter)
        if parameter is not None:
            others = first.setdefault(id(parameter), [])
            target.same_as = next((targets[other] for other in others if said[other] == said[key]), None)
            others += [key] if target.same_as is None else []


def merged(target: Target) -> tuple[Tensor | None, Tensor | None]:
    """New weight and bias in the module's layout and dtype; None where unchanged."""
    layout = target.layout
    old, old_bias = stored_weight(target.module, layout)
    handler = layer_handler(target.module)
    if handler is None and layout.parameter not in target.module._parameters:
        old = None  # a parametrized weight: what is put there would be lost
    if old is None or not old.is_floating_point():
        raise NotMergeableError(f"{type(target.module).__name__} holds no dense floating-point weight to merge into")
    if old.dtype.itemsize == 1:  # float8 rounds most of an update away
        raise NotMergeableError(f"{target.keys}: a weight in {old.dtype} keeps no merge; keep it active instead")
    if hasattr(old, "device_mesh"):  # a DTensor: fully_shard keeps its own record of it
        raise NotMergeableError(
            f"{target.keys}: the weight is sharded; merge before fully_shard, or in an unsharded model"
        )
    wide = torch.promote_types(old.dtype, torch.float32)
    weight = old.detach().to(wide)
    bias = None if old_bias is None else old_bias.detach().to(wide)
    if None in target.matrices:
        folded, new_bias = fold(canonical(weight, layout), bias, [*target.matrices[None].values()])
        new_weight = canonical(folded, layout)
    else:
        new_weight, new_bias = _fold_stack(target, weight, bias)
    changed = _narrowed(target, new_weight, old.dtype, "weight").contiguous(memory_format=_memory_format(old))
    if new_bias is bias or new_bias is None:
        return changed, None
    if handler is None and layout.bias_parameter not in target.module._parameters:
        kind = type(target.module).__name__
        raise NotMergeableError(f"{target.keys}: {kind} cannot take the bias that merging needs")
    return changed, _narrowed(target, new_bias, old.dtype, "bias")


def _narrowed(target: Target, value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A merged tensor in the base's dtype.

    Raises:
        NotMergeableError: It is not finite there.
    """
    narrow = value.to(dtype)
    if not not_finite(narrow):
        return narrow
    if not_finite(value):
        raise NotMergeableError(
            f"merging at {target.keys} would give a {what} with NaN or infinity; nothing was changed"
        )
    told = f"merging at {target.keys} would give a {what} with {value.abs().max().item():g} in it, and {dtype} ends at"
    raise NotMergeableError(
        f"{told} {torch.finfo(dtype).max:g}; nothing was changed. Merge it with a smaller weight, keep it active "
        "instead, or load the base in a wider dtype"
    )


def _fold_stack(target: Target, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A stack of weights [experts, ...], one after the other."""
    weight, new_bias = weight.clone(), None if bias is None else bias.clone()
    for index, parts in target.matrices.items():
        own_bias = None if bias is None else bias[index]
        folded, folded_bias = fold(canonical(weight[index], target.layout), own_bias, [*parts.values()])
        weight[index] = canonical(folded, target.layout)
        if folded_bias is not None:
            if new_bias is None:
                raise NotMergeableError(f"{target.keys}: the experts have no bias, and merging needs one")
            new_bias[index] = folded_bias
    return weight, new_bias


def _memory_format(weight: Tensor) -> torch.memory_format:
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
