"""What can be told of a module from its class alone: layouts, and paths below it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adapterkit.errors import blaming
from adapterkit.plugins.handlers import handler_of
from adapterkit.points import WeightLayout


def weight_layout(module: nn.Module) -> tuple[WeightLayout, int, int] | None:
    """Layout, in_features and out_features of a module that holds an adaptable weight; None for any other."""
    handler = handler_of(module)
    if handler is None:
        return _own_layout(module)
    with blaming(f"layer handler {type(handler).__name__}", "layout()", handler.plugin):
        return handler.layout(module) or _own_layout(module)


def _own_layout(module: nn.Module) -> tuple[WeightLayout, int, int] | None:
    if isinstance(module, nn.Linear):
        return WeightLayout("linear", bias=module.bias is not None), *_widths(module)
    if isinstance(module, nn.Embedding):
        return WeightLayout("embedding", scale=_embedding_scale(module)), module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
        layout = WeightLayout(
            "conv",
            bias=module.bias is not None,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=padding,
            dilation=tuple(module.dilation),
            padding_mode=module.padding_mode,
            groups=module.groups,
        )
        return layout, module.in_channels, module.out_channels
    if is_class(module, "transformers", "Conv1D"):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return WeightLayout("linear_t", bias=True), int(rows), int(columns)
    return _quantizable(module)


def _widths(module: nn.Linear) -> tuple[int, int]:
    """in_features and out_features of the weight itself: one that is tied need not have those that its layer says."""
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2:
        rows, columns = weight.shape
        return int(columns), int(rows)
    return int(module.in_features), int(module.out_features)  # int: a model may have computed its sizes with tensors


def _quantizable(module: Any) -> tuple[WeightLayout, int, int] | None:
    """Layers of I-BERT, which give a scale beside what they compute: they read their weight."""
    if is_class(module, "transformers", "QuantLinear"):
        layout = WeightLayout("linear", bias=module.bias is not None, access="read")
        return layout, int(module.in_features), int(module.out_features)
    if is_class(module, "transformers", "QuantEmbedding"):
        rows, columns = module.weight.shape
        return WeightLayout("embedding", access="read"), int(rows), int(columns)
    return None


def is_class(module: nn.Module, package: str, name: str) -> bool:
    """Whether `package:name` is among the module's classes, without importing the package."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(module).__mro__)


def joined(path: str, inner: str) -> str:
    """A path below another."""
    return f"{path}.{inner}" if path and inner else path or inner


def first_path(module: nn.Module, alternatives: str) -> str | None:
    """The first alternative that exists below `module` and is a module."""
    for path in alternatives.split("|"):
        if _descend(module, path) is not None:
            return path
    return None


def _descend(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else []:
        child = module._modules[name] if name in module._modules else None  # noqa: SIM401 - a scripted module's have no `get`
        if child is None:
            return None
        module = child
    return module


def _embedding_scale(module: nn.Embedding) -> float:
    # transformers' scaled embeddings: Gemma computes with a buffer, rounded as its dtype is, and BART with a number.
    scale = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, Tensor) and scale.is_meta:
        scale = getattr(module, "scalar_embed_scale", 1.0)
    return float(scale)


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path that is there; KeyError where none is.

    `get_submodule` checks more and takes six times as long: a fourth of the time of `Adapters.add`.
    """
    module: Any = root
    for name in path.split(".") if path else ():
        module = module._modules[name]
    return module
