"""What can be told of any model's layers, of those too whose class nobody has described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adapterkit.backend import SITE
from adapterkit.mapping.layouts import weight_layout
from adapterkit.mapping.structure import base_class
from adapterkit.plugins.handlers import handler_of
from adapterkit.points import WeightLayout

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_SMALLEST = 2  # bytes of a number that a sum can be kept in; what has less is quantized


def layer_layout(module: nn.Module) -> tuple[WeightLayout, int, int] | None:
    """As `weight_layout`; whether a model calls the layer or reads its weight cannot be seen, and it may do either.

    The weight of a class with a forward of its own is always read.

    What such a forward does to its input or its weight is not known (it may pad, or standardise): an adapter beside it
    would compute something else, whereas one in the weight that it reads is what merging makes of it.
    """
    found = weight_layout(module)
    if found is None or not isinstance(module, _PLAIN) or handler_of(module) is not None or not _is_dense(module):
        return found
    layout, inputs, outputs = found
    return replace(layout, access="read" if _has_own_forward(module) else "any"), inputs, outputs


def may_be_read(module: nn.Module) -> bool:
    """Whether a linear layer acts alike where it is called and where its weight is read: its class is torch's own."""
    found = layer_layout(module)
    return isinstance(module, nn.Linear) and found is not None and found[0].access == "any"


def call_plainly(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer without a forward of its own computes with its own parameters, whatever its attributes show."""
    (x,) = (*args, *kwargs.values())
    weight, bias = _own(module, "weight"), _own(module, "bias")
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, nn.Embedding):
        options = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse)
        return F.embedding(x, weight, *options)
    return module._conv_forward(x, weight, bias)


def _own(module: nn.Module, name: str) -> Any:
    # Where it is no parameter any more, a parametrization was registered after the adapter.
    return module._parameters[name] if name in module._parameters else getattr(module, name, None)


def base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module, without those that hold adapters."""
    adapted = SITE in module.__dict__
    for name, child in module._modules.items():
        if child is not None and not (adapted and name == "adapterkit"):
            yield name, child


def declared_heads(model: nn.Module) -> list[nn.Module]:
    """The classifiers or the output projection, where a model of timm or transformers tells of them."""
    wrapped = _wrapped(model)
    heads: list[nn.Module] = []
    for part in (model,) if wrapped is None else (model, wrapped):
        for name in ("get_classifier", "get_output_embeddings"):
            try:
                told = getattr(part, name)()
            except (AttributeError, NotImplementedError, TypeError):  # there is none, or it is of another meaning
                continue
            heads += [head for head in (told if isinstance(told, tuple) else (told,)) if isinstance(head, nn.Module)]
    return heads or _label_layers(model, wrapped)


def _wrapped(model: Any) -> nn.Module | None:
    """The model that one of transformers puts a head on."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) and inner is not model else None


def _label_layers(model: Any, wrapped: nn.Module | None) -> list[nn.Module]:
    """What has as many outputs as there are labels, beside the wrapped model; of a whole one, among its children."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(labels, int):
        return []
    inside = {id(module) for module in wrapped.modules()} if wrapped is not None else set[int]()
    beside = model.children() if wrapped is None else (m for m in model.modules() if id(m) not in inside)
    return [module for module in beside if getattr(module, "out_features", None) == labels]


def _has_own_forward(module: nn.Module) -> bool:
    cls = base_class(module)
    plain = next(base for base in _PLAIN if issubclass(cls, base))
    return any(getattr(cls, name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward"))


def _is_dense(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return False
    return weight.is_floating_point() and weight.element_size() >= _SMALLEST
