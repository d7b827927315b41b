"""From an entry of a family table to the injection points of one block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from adapterkit.errors import PluginError
from adapterkit.mapping.entries import (
    Attention,
    Entry,
    Experts,
    Fused,
    FusedInput,
    Output,
    Read,
    Tokens,
    Weight,
    equal_parts,
)
from adapterkit.mapping.layers import may_be_read
from adapterkit.mapping.layouts import first_path, joined, weight_layout
from adapterkit.points import (
    AttentionLayout,
    AttentionPoint,
    Form,
    InjectionPoint,
    OutputLayout,
    OutputPoint,
    Span,
    Tag,
    TokensLayout,
    TokensPoint,
    WeightLayout,
    WeightPoint,
)

_MATRIX = 2  # dimensions of a linear layer's weight; a convolution's has more


@functools.singledispatch
def points_of(entry: Entry, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    """The points of one entry in one block; none where its paths do not exist there."""
    raise PluginError(f"{entry!r} is no entry of a family table")


@points_of.register
def _(entry: Weight, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found = _layer(block, entry.path)
    if found is None:
        return []
    path, layout, inputs, outputs = found
    if entry.role == "head" and may_be_read(block.get_submodule(path)):  # by losses that are fused with it
        layout = replace(layout, access="any")
    return [WeightPoint(entry.role, joined(prefix, path), site, inputs, outputs, layout, tags=tags)]


@points_of.register
def _(entry: Fused, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found = _layer(block, entry.path)
    if found is None:
        return []
    path, layout, inputs, outputs = found
    spans = _parts(entry, block, outputs)
    return [
        WeightPoint(role, joined(prefix, path), site, inputs, span.features, layout, span, tags=tags)
        for role, span in zip(entry.roles, spans, strict=True)
    ]


@points_of.register
def _(entry: FusedInput, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found = _layer(block, entry.path)
    if found is None:
        return []
    path, layout, inputs, outputs = found
    spans = _parts(entry, block, inputs)
    return [
        WeightPoint(role, joined(prefix, path), site, span.features, outputs, layout, in_span=span, tags=tags)
        for role, span in zip(entry.roles, spans, strict=True)
    ]


@points_of.register
def _(entry: Read, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found = _parameter(block, entry.path, entry.parameter)
    if found is None:
        return []
    path, module, weight = found
    layout = _read_layout(module, entry.form, entry.parameter, entry.bias)
    called = weight_layout(module) if entry.form == "conv" else None
    if called is not None:
        shape, columns, rows = called
        layout = replace(shape, access="read")
    else:
        rows, columns = weight.shape if entry.form == "linear" else weight.shape[::-1]
    return [WeightPoint(entry.role, joined(prefix, path), site, int(columns), int(rows), layout, tags=tags)]


@points_of.register
def _(entry: Experts, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found = _parameter(block, entry.path, entry.parameter)
    if found is None:
        return []
    path, module, weight = found
    experts, *shape = weight.shape
    rows, columns = shape if entry.form == "linear" else shape[::-1]
    single = len(entry.roles) == 1 and entry.split is None
    spans: Sequence[Span | None] = [None] if single else _parts(entry, block, rows)
    layouts = _stacked(_read_layout(module, entry.form, entry.parameter, entry.bias), experts)
    full = joined(prefix, path)
    points: list[InjectionPoint] = []
    for expert, inner in enumerate(layouts):
        marked = {**tags, "expert": expert}
        place = f"{site}.{expert}" if site else str(expert)
        for role, span in zip(entry.roles, spans, strict=True):
            width = rows if span is None else span.features
            points.append(WeightPoint(role, full, place, columns, width, inner, span, tags=marked))
    return points


def _parts(entry: Fused | FusedInput | Experts, block: nn.Module, rows: int) -> Sequence[Span]:
    """The spans of a fused projection, one for each of its roles.

    Raises:
        PluginError: `split` gives others, or the rows do not divide.
    """
    count = len(entry.roles)
    if entry.split is None:
        if rows % count:
            raise PluginError(f"the {rows} rows of {entry.path!r} are not {count} equal parts; give the entry a split")
        return equal_parts(count, rows)
    spans: object = entry.split(block, rows)
    if not isinstance(spans, Sequence) or not all(isinstance(span, Span) for span in spans) or len(spans) != count:
        raise PluginError(
            f"split of {entry.path!r} returned {spans!r}; expected {count} spans, for {', '.join(entry.roles)}"
        )
    for role, span in zip(entry.roles, spans, strict=True):
        if span.start < 0 or span.start + (span.count - 1) * (span.step or 0) + span.size > rows:
            raise PluginError(f"split of {entry.path!r} gives {role} {span}, but there are {rows} rows")
    return spans


def _layer(block: nn.Module, alternatives: str) -> tuple[str, WeightLayout, int, int] | None:
    """Path, layout, in_features and out_features of the layer at the first alternative that exists."""
    path = first_path(block, alternatives)
    found = weight_layout(block.get_submodule(path)) if path is not None else None
    return None if path is None or found is None else (path, *found)


def _parameter(block: nn.Module, alternatives: str, name: str) -> tuple[str, nn.Module, nn.Parameter] | None:
    """Path and module of the first alternative that exists, and its parameter of this name."""
    path = first_path(block, alternatives)
    module = None if path is None else block.get_submodule(path)
    weight = None if module is None else module._parameters.get(name)
    return None if path is None or module is None or weight is None else (path, module, weight)


@functools.lru_cache(maxsize=8)
def _stacked(layout: WeightLayout, experts: int) -> tuple[WeightLayout, ...]:
    """The layouts of all experts of a stack: the same in every layer, and made once for thousands of points."""
    return tuple(replace(layout, index=expert) for expert in range(experts))


def _read_layout(module: nn.Module, form: Form, parameter: str, bias: str) -> WeightLayout:
    has_bias = module._parameters.get(bias) is not None
    return WeightLayout(form, bias=has_bias, access="read", parameter=parameter, bias_parameter=bias)


@points_of.register
def _(entry: Output, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    core, residual = first_path(block, entry.core), first_path(block, entry.residual)
    if core is None or residual is None:
        return []

    def absolute(alternatives: str | None) -> str | None:
        path = first_path(block, alternatives) if alternatives else None
        return None if path is None else joined(prefix, path)

    norm_in, norm_out = absolute(entry.norm_in), absolute(entry.norm_out)
    width = _width(block, [entry.norm_in, entry.norm_out, entry.width, entry.residual])
    first = entry.convolved is not None and _is_convolved(block, entry.convolved)
    layout = OutputLayout(joined(prefix, residual), norm_in, norm_out, channels_first=first)
    return [OutputPoint(entry.role, joined(prefix, core), site, width, width, layout, tags=tags)]


@points_of.register
def _(entry: Attention, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    if path is None:
        return []
    heads, width, *others = _heads(entry, block.get_submodule(path))
    value_dim = next((other for other in others if other != width), None)
    layout = AttentionLayout(heads, width, value_dim)
    widths = (heads * width, heads * layout.value_width)
    return [AttentionPoint(entry.role, joined(prefix, path), site, *widths, layout, tags=tags)]


def _heads(entry: Attention, module: nn.Module) -> Sequence[int]:
    found: object = entry.heads(module)
    if (
        not isinstance(found, Sequence)
        or len(found) not in (2, 3)
        or not all(isinstance(number, int) and number > 0 for number in found)
    ):
        raise PluginError(
            f"heads of {entry.role!r} returned {found!r} for {type(module).__name__} at {entry.path!r}; expected "
            "(kv_heads, head_dim) or (kv_heads, head_dim, value_dim), positive integers"
        )
    return found


@points_of.register
def _(entry: Tokens, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    if path is None:
        return []
    width = _embedding_width(block.get_submodule(path), block)
    layout = TokensLayout(entry.extendable)
    return [TokensPoint(entry.role, joined(prefix, path), site, width, width, layout, tags=tags)]


def _is_convolved(block: nn.Module, alternatives: str) -> bool:
    path = first_path(block, alternatives)
    parameters = iter(()) if path is None else block.get_submodule(path).parameters()
    return next((one.ndim > _MATRIX for one in parameters if one.ndim >= _MATRIX), False)


def _width(block: nn.Module, places: Sequence[str | None]) -> int:
    """The residual stream's width: that of the sublayer's norm, or else of the module that the stream enters."""
    for alternatives in places:
        path = first_path(block, alternatives) if alternatives else None
        module = None if path is None else block.get_submodule(path)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):  # these may have no parameters
            return module.normalized_shape[-1]
        for parameter in module.parameters() if module is not None else ():
            return parameter.shape[1 if parameter.ndim > _MATRIX else -1]  # of a convolution, its inputs
    told = ", ".join(repr(place) for place in places if place)
    raise PluginError(
        f"{type(block).__name__} has no parameters at {told}, which would tell the width of the residual stream; name "
        "a module that has, as Output(..., width=...)"
    )


def _embedding_width(module: nn.Module, model: nn.Module) -> int:
    for candidate in (module, model):
        for inner in candidate.modules():
            if isinstance(inner, nn.Embedding):
                return inner.embedding_dim
    for parameter in module.parameters():
        return parameter.shape[-1]
    raise PluginError(f"neither {type(module).__name__} nor the model around it tells the width of the tokens")
