"""Folding adapters into the weights, and giving back the very bits.

A merge puts new parameters in the place of the old ones and keeps the old: unmerging is bitwise, and a weight that is
tied to another module's stays as it is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule
from adapterkit.compose import Selection, merge_weights
from adapterkit.errors import NotMergeableError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import canonical
from adapterkit.points import InjectionPoint, WeightLayout
from adapterkit.state import Merge, State


@dataclass
class _Target:
    """One module, and what is to be folded into it."""

    module: nn.Module
    layout: WeightLayout
    parts: dict[str, tuple[InjectionPoint, list[tuple[AdapterModule, float]]]] = field(default_factory=dict)


def merge(state: State, selection: Selection) -> None:
    """Folds the selection into the weights. Everything is computed before anything is changed.

    Raises:
        NotMergeableError: An adapter has no equivalent weight, or the merged weights would not be finite.
    """
    targets = _targets(state, selection)
    with torch.no_grad():
        computed = [(target.module, *_merged(target)) for target in targets]
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for module, weight, bias in computed:
        originals += [_swap(module, name, new) for name, new in (("weight", weight), ("bias", bias)) if new is not None]
    state.merge = Merge(selection, state.switch.default, originals)
    state.switch.default = Selection()


def unmerge(state: State) -> None:
    """Puts the original parameters back, on the device and in the dtype that the model has now."""
    if state.merge is None:
        return
    for module, name, original in reversed(state.merge.originals):
        present = module._parameters[name]
        if original is not None and present is not None and _moved(original, present):
            original.data = original.data.to(present.device, present.dtype)
        module._parameters[name] = original
    state.switch.default = state.merge.before
    state.merge = None


def _targets(state: State, selection: Selection) -> Iterable[_Target]:
    targets: dict[int, _Target] = {}
    problems: list[str] = []
    for name, weight in selection.weights.items():
        for key, adapter in state.adapters[name].modules.items() if weight else ():
            point = state.adapters[name].points[key]
            module = state.mapped.module(point)
            layout = point.layout
            if not isinstance(layout, WeightLayout):
                problems.append(f"{name!r} at {key} acts on a sublayer's {point.kind}, not on a weight")
                continue
            target = targets.setdefault(id(module), _Target(module, layout))
            target.parts.setdefault(key, (point, []))[1].append((adapter, weight))
    if problems:
        more = f" (and at {len(problems) - 1} more points)" if len(problems) > 1 else ""
        raise NotMergeableError(f"{problems[0]}{more}; keep it active instead of merging it")
    return targets.values()


def _merged(target: _Target) -> tuple[Tensor | None, Tensor | None]:
    """New weight and bias in the module's layout and dtype; None where unchanged."""
    old, old_bias = target.module.weight, getattr(target.module, "bias", None)
    if not isinstance(old, Tensor) or not old.is_floating_point():
        raise NotMergeableError(f"{type(target.module).__name__} holds no dense floating-point weight to merge into")
    wide = torch.promote_types(old.dtype, torch.float32)
    weight = canonical(old.detach(), target.layout).to(wide)
    bias = None if old_bias is None else old_bias.detach().to(wide)
    new_weight, new_bias = _fold(target, weight, bias)
    for tensor, what in ((new_weight, "weight"), (new_bias, "bias")):
        if tensor is not None and not tensor.is_meta and not torch.isfinite(tensor).all():
            keys = ", ".join(target.parts)
            raise NotMergeableError(f"merging at {keys} would give a {what} with NaN or infinity; nothing was changed")
    if new_bias is bias:
        changed_bias = None
    elif "bias" in target.module._parameters:
        changed_bias = None if new_bias is None else new_bias.to(old.dtype)
    else:
        raise NotMergeableError(
            f"{', '.join(target.parts)}: {type(target.module).__name__} cannot take the bias that merging needs"
        )
    changed = canonical(new_weight, target.layout).to(old.dtype)
    return changed.contiguous(memory_format=_memory_format(old)), changed_bias


def _fold(target: _Target, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weights: list[tuple[object, Tensor]] = []
    biases: list[tuple[object, Tensor]] = []
    for point, active in target.parts.values():
        span = point.span
        if span is None:
            return merge_weights(weight, bias, active)
        rows_bias = None if bias is None else read_span(bias, span, 0)
        rows, new_bias = merge_weights(read_span(weight, span, 0), rows_bias, active)
        weights.append((span, rows))
        if new_bias is not None and new_bias is not rows_bias:
            biases.append((span, new_bias))
    whole_bias = bias
    if biases:
        whole_bias = write_spans(weight.new_zeros(weight.shape[0]) if bias is None else bias, biases, 0)  # type: ignore[arg-type]
    return write_spans(weight, weights, 0), whole_bias  # type: ignore[arg-type]


def _memory_format(weight: Tensor) -> torch.memory_format:
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _swap(module: nn.Module, name: str, new: Tensor) -> tuple[nn.Module, str, nn.Parameter | None]:
    old = module._parameters[name]
    wanted = old.requires_grad if old is not None else False
    module._parameters[name] = nn.Parameter(new, requires_grad=wanted)
    return module, name, old


def _moved(original: Tensor, present: Tensor) -> bool:
    return original.device != present.device or original.dtype != present.dtype
