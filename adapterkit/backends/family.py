"""A model family as data: which roles are at which paths, resolved on the live module tree.

Paths are relative, and list alternatives separated by `|`, so that a module that the next release of a library renames
is one more word here. Nothing is run and no weight is read: resolving works on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from adapterkit.points import (
    AttentionLayout,
    InjectionPoint,
    Kind,
    Layout,
    OutputLayout,
    Span,
    Tag,
    TokensLayout,
    WeightLayout,
)

SplitRows = Callable[[nn.Module, int], Sequence[Span]]
"""Spans of a fused projection, from the block that holds it and the number of its rows."""


@dataclass(frozen=True)
class Weight:
    """One projection, convolution or embedding."""

    role: str
    path: str


@dataclass(frozen=True)
class Fused:
    """Several projections in one module, in the order of their rows; in equal parts unless `split` says otherwise."""

    roles: tuple[str, ...]
    path: str
    split: SplitRows | None = None


@dataclass(frozen=True)
class Output:
    """A sublayer's output, at the module `core` that computes it last. Paths as in `OutputLayout`."""

    role: str
    core: str
    residual: str
    norm_in: str | None = None
    norm_out: str | None = None


@dataclass(frozen=True)
class Attention:
    """A module whose keys and values can be extended. `heads` gives (kv_heads, head_dim) of it."""

    role: str
    path: str
    heads: Callable[[nn.Module], tuple[int, int]]


@dataclass(frozen=True)
class Tokens:
    """The module that makes the embedded sequence."""

    role: str
    path: str
    extendable: bool = False


Entry = Weight | Fused | Output | Attention | Tokens


@dataclass(frozen=True)
class Group:
    """Entries that recur at every match of a pattern.

    Attributes:
        pattern: Alternatives; `{name}` stands for an index and becomes a tag: `model.layers.{layer}|layers.{layer}`.
            The empty string is the model itself.
        site: Where the points lie in canonical words: `{layer}`, `down.{block}.{index}`.
        entries: What is there. An entry whose paths do not exist in a block is absent there.
        tags: Further tags, such as `stage`.
    """

    pattern: str
    site: str
    entries: tuple[Entry, ...]
    tags: dict[str, Tag] = field(default_factory=dict)


def resolve(model: nn.Module, groups: Sequence[Group], component: str) -> list[InjectionPoint]:
    """The points of all groups, in the order of the module tree."""
    points: list[InjectionPoint] = []
    for group in groups:
        for prefix, indices in _blocks(model, group.pattern):
            block = model.get_submodule(prefix)
            tags: dict[str, Tag] = {"component": component, **group.tags, **indices}
            site = group.site.format(**indices)
            for entry in group.entries:
                points += _points_of(entry, block, prefix, site, tags)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(points, key=lambda point: order[point.path])


def weight_layout(module: nn.Module) -> tuple[WeightLayout, int, int] | None:
    """Layout, in_features and out_features of a module that holds an adaptable weight; None for any other."""
    if isinstance(module, nn.Linear):
        return WeightLayout("linear", bias=module.bias is not None), module.in_features, module.out_features
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
    return None


def is_class(module: nn.Module, package: str, name: str) -> bool:
    """Whether `package:name` is among the module's classes, without importing the package."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(module).__mro__)


def first_path(module: nn.Module, alternatives: str) -> str | None:
    """The first alternative that exists below `module` and is a module."""
    for path in alternatives.split("|"):
        if _descend(module, path) is not None:
            return path
    return None


def _descend(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else []:
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _embedding_scale(module: nn.Embedding) -> float:
    scale = getattr(module, "scalar_embed_scale", 1.0)  # transformers' scaled embeddings (Gemma 3)
    return float(scale)


def _blocks(model: nn.Module, pattern: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Paths and indices of every match of the first alternative that matches at all."""
    for alternative in pattern.split("|"):
        found = list(_matches(model, alternative.split(".") if alternative else [], "", {}))
        if found:
            yield from found
            return


def _matches(
    module: nn.Module, rest: list[str], prefix: str, indices: dict[str, int]
) -> Iterator[tuple[str, dict[str, int]]]:
    if not rest:
        yield prefix, indices
        return
    head, tail = rest[0], rest[1:]
    named = head.startswith("{")
    for name, child in module._modules.items():
        if child is None or not (name.isdigit() if named else name == head):
            continue
        inner = {**indices, head[1:-1]: int(name)} if named else indices
        yield from _matches(child, tail, f"{prefix}.{name}" if prefix else name, inner)


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


@functools.singledispatch
def _points_of(entry: Entry, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    raise TypeError(f"no such entry: {entry!r}")


def _point(
    role: str,
    path: str,
    kind: Kind,
    site: str,
    features: tuple[int, int],
    layout: Layout,
    tags: dict[str, Tag],
    span: Span | None = None,
) -> InjectionPoint:
    return InjectionPoint(role, path, kind, site, *features, layout, span, dict(tags))


@_points_of.register
def _(entry: Weight, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    found = weight_layout(block.get_submodule(path)) if path is not None else None
    if path is None or found is None:
        return []
    layout, inputs, outputs = found
    return [_point(entry.role, _join(prefix, path), "weight", site, (inputs, outputs), layout, tags)]


@_points_of.register
def _(entry: Fused, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    found = weight_layout(block.get_submodule(path)) if path is not None else None
    if path is None or found is None:
        return []
    layout, inputs, outputs = found
    spans = entry.split(block, outputs) if entry.split else equal_parts(len(entry.roles), outputs)
    return [
        _point(role, _join(prefix, path), "weight", site, (inputs, span.features), layout, tags, span)
        for role, span in zip(entry.roles, spans, strict=True)
    ]


@_points_of.register
def _(entry: Output, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    core, residual = first_path(block, entry.core), first_path(block, entry.residual)
    if core is None or residual is None:
        return []

    def absolute(alternatives: str | None) -> str | None:
        path = first_path(block, alternatives) if alternatives else None
        return None if path is None else _join(prefix, path)

    norm_in, norm_out = absolute(entry.norm_in), absolute(entry.norm_out)
    width = _width(block, [entry.norm_in, entry.norm_out])
    layout = OutputLayout(_join(prefix, residual), norm_in, norm_out)
    return [_point(entry.role, _join(prefix, core), "output", site, (width, width), layout, tags)]


@_points_of.register
def _(entry: Attention, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    if path is None:
        return []
    heads, width = entry.heads(block.get_submodule(path))
    return [
        _point(
            entry.role,
            _join(prefix, path),
            "attention",
            site,
            (heads * width, heads * width),
            AttentionLayout(heads, width),
            tags,
        )
    ]


@_points_of.register
def _(entry: Tokens, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    path = first_path(block, entry.path)
    if path is None:
        return []
    width = _embedding_width(block.get_submodule(path), block)
    return [
        _point(entry.role, _join(prefix, path), "tokens", site, (width, width), TokensLayout(entry.extendable), tags)
    ]


def equal_parts(count: int, rows: int) -> list[Span]:
    """`rows` in `count` contiguous spans of one size."""
    return [Span(i * (rows // count), rows // count) for i in range(count)]


def _width(block: nn.Module, norms: Sequence[str | None]) -> int:
    """The residual stream's width: that of the sublayer's norm."""
    for alternatives in norms:
        path = first_path(block, alternatives) if alternatives else None
        if path is not None:
            for parameter in block.get_submodule(path).parameters():
                return parameter.shape[-1]
    raise ValueError(f"{type(block).__name__} has no norm with parameters at {[n for n in norms if n]}")


def _embedding_width(module: nn.Module, model: nn.Module) -> int:
    for candidate in (module, model):
        for inner in candidate.modules():
            if isinstance(inner, nn.Embedding):
                return inner.embedding_dim
    for parameter in module.parameters():
        return parameter.shape[-1]
    raise ValueError(f"cannot tell the token width of {type(module).__name__}")
