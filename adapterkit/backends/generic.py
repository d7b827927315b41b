"""What no family claims: any module, mapped by the classes of its layers and by names that leave no doubt.

A layer's site is its path, and its role is a family's only where structure says so: projections whose names are all
there in one parent, or a part of torch's own attention and transformer layers. Elsewhere it is `linear` or `conv`, and
the user can say more: see `adapterkit.mapping.roles`.

There are only weight points. Whether a model reads a weight instead of calling its module cannot be seen from outside,
except in torch's own layers, where it is known, and in layers whose class has a forward of its own. Elsewhere adapters
act on both: on the call, and on what is read while the parent or the model is called.
Weights that a model keeps as bare parameters, such as stacks of experts, need a family of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from adapterkit.backend import Backend
from adapterkit.backends.transformers_ties import untying
from adapterkit.errors import UnsupportedModelError
from adapterkit.layouts import Repeats
from adapterkit.mapping.entries import equal_parts
from adapterkit.mapping.layers import base_children, declared_heads, layer_layout
from adapterkit.mapping.roles import RoleMap
from adapterkit.mapping.roles_plugin import write_plugin
from adapterkit.points import Access, Form, InjectionPoint, Span, Tag, WeightLayout, WeightPoint

__all__ = ["GenericBackend", "tags_of", "write_plugin"]


@dataclass(frozen=True)
class _Hint:
    """What a parent says of a child."""

    role: str
    access: Access = "call"


_QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}

# Names of one parent's children that must all be there, and their roles. `*` is the sort of attention.
_TABLES: tuple[Mapping[str, str], ...] = (
    {**{name: f"*.{part}" for name, part in _QKV.items()}, "o_proj": "*.o"},
    {**{name: f"*.{part}" for name, part in _QKV.items()}, "out_proj": "*.o"},
    {"query": "*.q", "key": "*.k", "value": "*.v"},
    {"gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down"},
    {"fc1": "mlp.up", "fc2": "mlp.down"},
)
_CROSS = frozenset({"encoder_attn", "cross_attn", "crossattention", "cross_attention", "multihead_attn"})
_HEADS = frozenset({"lm_head", "head", "classifier", "score"})  # only as children of the model itself
_ROLES: Mapping[Form, str] = {"linear": "linear", "linear_t": "linear", "conv": "conv", "embedding": "embed.tokens"}


class GenericBackend(Backend):
    """Linear, Conv1D, convolution and embedding layers, and the projections of `nn.MultiheadAttention`, of any model.

    Attributes:
        roles: Roles by path, as in `adapterkit.mapping.roles`, for a model of a known structure.
    """

    writes = ("save_pretrained",)
    in_pipelines = False  # what no family claims there (a safety checker) is not what the user means
    roles: ClassVar[Mapping[str, str]] = {}

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`.

        Raises:
            UnsupportedModelError: There is no layer that an adapter could act in.
            TargetNotFoundError, IncompatibleTargetError, ConfigError: The class's `roles` do not fit the model.
        """
        heads = {id(part) for head in declared_heads(model) for part in head.modules()}
        found = [
            replace(point, role="head") if heads and id(model.get_submodule(point.path)) in heads else point
            for point in _points(model, "", None, component, set())
        ]
        if not found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no adaptable layer: no Linear, Conv1d, Conv2d, Conv3d, Embedding, "
                "transformers Conv1D or MultiheadAttention. Models that are scripted, traced, or quantized by "
                "torch.ao.quantization are adapted before that"
            )
        return RoleMap(self.roles).apply(found, {component: model}) if self.roles else found

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        # transformers makes beams of the samples of an encoder-decoder of text; elsewhere rows may be images or pieces.
        config = getattr(model, "config", None)
        of_text = getattr(model, "main_input_name", None) == "input_ids"
        return "each" if of_text and getattr(config, "is_encoder_decoder", None) is True else None

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)


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
        hint = hint or _Hint(_ROLES[layout.form])
        if not inputs or not outputs:
            raise UnsupportedModelError(
                f"{path or type(module).__name__} is a {type(module).__name__} whose sizes are not known yet; "
                "run the model once on an example before adapting it"
            )
        layout = replace(layout, access="read") if hint.access == "read" else layout
        yield _point(hint.role, path, inputs, outputs, layout, component)
    hints = _hints(module, path, hint)
    for name, child in base_children(module):
        yield from _points(child, f"{path}.{name}" if path else name, hints.get(name), component, seen)


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
    linears = _linears(module)
    hints: dict[str, _Hint] = {} if path else {name: _Hint("head") for name in _HEADS & linears}
    cross = path.rpartition(".")[2] in _CROSS
    for table in _TABLES:
        if table.keys() <= linears:
            hints |= {name: _Hint(role.replace("*", "cross" if cross else "attn")) for name, role in table.items()}
    return hints


def _linears(module: nn.Module) -> frozenset[str]:
    layouts = {name: layer_layout(child) for name, child in base_children(module)}
    return frozenset(name for name, found in layouts.items() if found and found[0].form in ("linear", "linear_t"))
