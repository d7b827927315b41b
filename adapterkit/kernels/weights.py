"""One view of every weight, [out, in / groups, *kernel], and what a module of that layout computes with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.backend import SITE
from adapterkit.contract.layer import LayerHandler
from adapterkit.errors import PluginError, blaming
from adapterkit.kernels.spans import read_span
from adapterkit.plugins.handlers import handler_of
from adapterkit.points import InjectionPoint, ParameterPoint, WeightLayout

_TRANSPOSED = ("linear_t", "embedding")
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def canonical(weight: Tensor, layout: WeightLayout) -> Tensor:
    """The module's weight as [out, in / groups, *kernel]: a view. Its own inverse."""
    return weight.mT if layout.form in _TRANSPOSED else weight


def is_transposed(layout: WeightLayout) -> bool:
    """Whether the module has its weight the other way round than adapters see it."""
    return layout.form in _TRANSPOSED


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums with numbers of this dtype are kept in: float32 or wider."""
    return torch.float32 if dtype.itemsize == 1 else torch.promote_types(dtype, torch.float32)


def base_weight(module: nn.Module, point: InjectionPoint) -> tuple[Tensor | None, Tensor | None]:
    """The frozen weight [out, in / groups, *kernel] and bias [out] of a point: its rows or columns, detached views.

    The weight is None where the module has none of that name.
    """
    if not isinstance(point, ParameterPoint):
        raise TypeError(f"{point.id} is no weight point")
    layout = point.layout
    weight, bias = (None if tensor is None else tensor.detach() for tensor in stored_weight(module, layout))
    return point_weight(weight, bias, point, layout)


def stored_weight(module: nn.Module, layout: WeightLayout) -> tuple[Tensor | None, Tensor | None]:
    """A layer's weight and bias, dense, as its layout has them: with grad where the layer keeps them as parameters.

    The one place that reads a base's weight: how a layer keeps it is asked of its handler: `adapterkit.contract.layer`.

    Returns:
        Each is None where the layer has none of that name.

    Raises:
        PluginError: The handler gives no dense weight.
    """
    bias, handler = _held(module, layout.bias_parameter), layer_handler(module)
    if handler is None:
        return _held(module, layout.parameter), bias
    if torch.compiler.is_compiling():
        return handler.weight(module, layout), bias
    with blaming(f"layer handler {type(handler).__name__}", "weight()", handler.plugin):
        return _checked(handler.weight(module, layout)), bias


def layer_handler(module: nn.Module) -> LayerHandler | None:
    """What tells how a layer keeps its weight; None for one that keeps it as a parameter."""
    site = module.__dict__.get(SITE)
    if site is not None and site.handler is not None:
        return site.handler
    return None if torch.compiler.is_compiling() else handler_of(module)  # a trace cannot ask plug-ins


def _checked(weight: object) -> Tensor:
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return weight
    told = f"a tensor of {weight.dtype}" if isinstance(weight, Tensor) else repr(weight)[:80]
    raise PluginError(f"returned {told}; expected a tensor of floating-point numbers of 16 bits or more")


def point_weight(
    weight: Tensor | None, bias: Tensor | None, point: InjectionPoint, layout: WeightLayout
) -> tuple[Tensor | None, Tensor | None]:
    """`base_weight`, from the parameters as their module holds them."""
    if layout.index is not None:
        weight, bias = (None if tensor is None else tensor[layout.index] for tensor in (weight, bias))
    if weight is None:
        return None, bias
    weight = canonical(weight, layout)
    if point.in_span is not None:
        weight = read_span(weight, point.in_span, 1)
    if point.span is not None:
        weight = read_span(weight, point.span, 0)
        bias = None if bias is None else read_span(bias, point.span, 0)
    return weight, bias


def _held(module: nn.Module, name: str) -> Tensor | None:
    # A weight that is parametrized (weight norm) is no parameter of this name, but an attribute.
    held = module._parameters[name] if name in module._parameters else getattr(module, name, None)
    return held if isinstance(held, Tensor) else None


def apply_weight(x: Tensor, weight: Tensor, layout: WeightLayout) -> Tensor:
    """What a module of this layout computes with the first factor of a weight, without bias.

    A grouped convolution uses the one factor [rank, in / groups, *kernel] in every group, which gives
    [batch, groups * rank, ...]; for a whole weight see `call_weight`.

    Args:
        x: The module's input; indices for an embedding.
        weight: [rows, in / groups, *kernel].

    Returns:
        The module's output shape with `rows` (times groups) features.
    """
    if layout.form == "embedding":
        rows = F.embedding(x, weight.mT)
        return rows if layout.scale == 1.0 else rows * layout.scale
    if layout.form == "conv":
        return _convolve(x, weight.repeat(layout.groups, *(1 for _ in weight.shape[1:])), None, layout)
    return F.linear(x, weight)


def call_weight(x: Tensor, weight: Tensor, bias: Tensor | None, layout: WeightLayout) -> Tensor:
    """What a module of this layout computes with another weight [out, in / groups, *kernel] and bias [out]."""
    if layout.form == "conv":
        return _convolve(x, weight, bias, layout)
    return apply_weight(x, weight, layout) if layout.form == "embedding" else F.linear(x, weight, bias)


def weight_gradient(x: Tensor, grad: Tensor, shape: Sequence[int], layout: WeightLayout) -> Tensor:
    """The gradient of a whole weight [out, in / groups, *kernel] of which a module computed with.

    Args:
        x: The module's input.
        grad: The gradient of its output.
        shape: Of the weight.
        layout: Of the module; no embedding.
    """
    if layout.form != "conv":
        return grad.reshape(-1, shape[0]).mT @ x.reshape(-1, shape[1])
    with torch.enable_grad():
        weight = x.new_zeros(shape).requires_grad_()
        return torch.autograd.grad(call_weight(x, weight, None, layout), weight, grad)[0]


def mix_features(h: Tensor, weight: Tensor, layout: WeightLayout) -> Tensor:
    """Applies `weight` [out, rank] to the features of `h`, group by group: the second of two factors.

    Args:
        h: What `apply_weight` gave for a first factor of `rank` rows.
        weight: [out, rank].
    """
    if layout.form != "conv":
        return F.linear(h, weight)
    pointwise = weight.reshape(*weight.shape, *(1 for _ in layout.kernel))
    return _CONVOLUTIONS[len(layout.kernel) - 1](h, pointwise, groups=layout.groups)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, layout: WeightLayout) -> Tensor:
    axes = len(layout.kernel)
    padding = layout.padding
    if layout.padding_mode != "zeros":
        x = F.pad(x, _around(layout), mode=layout.padding_mode)
        padding = (0,) * axes
    convolve = _CONVOLUTIONS[axes - 1]
    return convolve(x, weight, bias, layout.stride, padding, layout.dilation, layout.groups)  # pyright: ignore


def _around(layout: WeightLayout) -> list[int]:
    """Padding as torch's `pad` wants it: last axis first, both sides; "same" puts the odd one last, as torch does."""
    amounts: list[int] = []
    for axis in reversed(range(len(layout.kernel))):
        if layout.padding == "same":
            total = layout.dilation[axis] * (layout.kernel[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif layout.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(layout.padding[axis])] * 2
    return amounts
