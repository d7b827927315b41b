"""Every layer of any model, by its class and by names that leave no doubt; its site is its path."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy

from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping.entries import equal_parts
from adapterkit.mapping.layers import base_children, declared_heads, layer_layout
from adapterkit.points import Access, Form, InjectionPoint, Span, Tag, WeightLayout, WeightPoint


@dataclass(frozen=True)
class _Hint:
    """What a parent says of a child."""

    role: str
    access: Access = "call"


_CROSS = frozenset({"encoder_attn", "cross_attn", "crossattention", "cross_attention", "multihead_attn"})
_HEADS = frozenset({"lm_head", "head", "classifier", "score"})  # only as children of the model itself
_ROLES: Mapping[Form, str] = {"linear": "linear", "linear_t": "linear", "conv": "conv", "embedding": "embed.tokens"}


_EMBEDDINGS: Mapping[str, str] = {
    **dict.fromkeys(("position_embeddings", "position_embedding", "embed_positions", "pos_embed", "wpe"), "embed.pos"),
    **dict.fromkeys(("token_type_embeddings", "token_type_embedding"), "embed.type"),
}


def layer_points(model: nn.Module, component: str, beside: Collection[int] = ()) -> list[InjectionPoint]:
    """Weight points of the Linear, Conv1D, convolution and embedding layers, and of torch's own attentions, of a model.

    Raises:
        UnsupportedModelError: A layer is made when the model first runs.
    """
    heads = {id(part) for head in declared_heads(model) for part in head.modules()}
    return [
        replace(point, role="head") if heads and id(model.get_submodule(point.path)) in heads else point
        for point in _points(model, "", None, component, set(beside))
    ]


def _points(
    module: nn.Module, path: str, hint: _Hint | None, component: str, seen: set[int]
) -> Iterator[InjectionPoint]:
    """Points of a module and all below it; of a module that is met twice, those of its first path."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, nn.MultiheadAttention):
        yield from _projections(module, path, hint.role if hint else "attn", component)
    elif found := layer_layout(module):
        layout, inputs, outputs = found
        hint = hint or _Hint(_role(layout.form, path))
        if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
            raise UnsupportedModelError(
                f"{path or type(module).__name__} is a {type(module).__name__} whose sizes are not known yet; "
                "run the model once on an example before adapting it"
            )
        layout = replace(layout, access="read") if hint.access == "read" else layout
        if inputs and outputs:  # some models have a layer of no features, where two of their widths agree
            yield _point(hint.role, path, inputs, outputs, layout, component)
    hints = _hints(module, path, hint)
    for name, child in base_children(module):
        yield from _points(child, f"{path}.{name}" if path else name, hints.get(name), component, seen)


def _role(form: Form, path: str) -> str:
    name = path.rpartition(".")[2]
    return _EMBEDDINGS.get(name, _ROLES[form]) if form == "embedding" else _ROLES[form]


def _point(
    role: str, path: str, inputs: int, outputs: int, layout: WeightLayout, component: str, span: Span | None = None
) -> InjectionPoint:
    return WeightPoint(role, path, path, inputs, outputs, layout, span, tags=tags_of(path, component))


def tags_of(path: str, component: str) -> dict[str, Tag]:
    """The component, and as `layer` the first number of the path, if it has one."""
    numbers = [int(name) for name in path.split(".") if name.isdigit()]
    return {"component": component, **({"layer": numbers[0]} if numbers else {})}


def _projections(attention: nn.MultiheadAttention, path: str, sort: str, component: str) -> Iterator[InjectionPoint]:
    """Queries, keys and values, which torch's attention keeps as parameters: fused, or one by one."""
    width = attention.embed_dim
    own = attention._parameters
    if own.get("in_proj_weight") is not None:
        has_bias = own.get("in_proj_bias") is not None
        layout = _read("in_proj_weight", has_bias)
        for part, span in zip("qkv", equal_parts(3, 3 * width), strict=True):
            yield _point(f"{sort}.{part}", path, width, width, layout, component, span)
        return
    # The one bias of all three is no part of the single weights.
    for part, columns in zip("qkv", (width, attention.kdim, attention.vdim), strict=True):
        yield _point(f"{sort}.{part}", path, columns, width, _read(f"{part}_proj_weight", has_bias=False), component)


def _read(parameter: str, has_bias: bool) -> WeightLayout:
    bias = "in_proj_bias" if has_bias else ""
    return WeightLayout("linear", bias=has_bias, access="read", parameter=parameter, bias_parameter=bias)


def _hints(module: nn.Module, path: str, own: _Hint | None) -> dict[str, _Hint]:
    """What is certain of the children of a module."""
    if isinstance(module, nn.MultiheadAttention):
        return {"out_proj": _Hint(f"{own.role if own else 'attn'}.o", "read")}
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        # In evaluation the encoder layer hands the weights of its linears to one kernel.
        feed_forward = {"linear1": _Hint("mlp.up", "read"), "linear2": _Hint("mlp.down", "read")}
        return {**feed_forward, "multihead_attn": _Hint("cross")}
    hints: dict[str, _Hint] = {} if path else {name: _Hint("head") for name in _HEADS & _linears(module)}
    return hints | {name: _Hint("cross") for name, child in base_children(module) if name in _CROSS and _torchs(child)}


def _torchs(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _linears(module: nn.Module) -> frozenset[str]:
    layouts = {name: layer_layout(child) for name, child in base_children(module)}
    return frozenset(name for name, found in layouts.items() if found and found[0].form in ("linear", "linear_t"))
