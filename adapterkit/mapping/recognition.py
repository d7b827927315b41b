"""Finds attentions, feed-forwards and blocks in any model, by the templates: their children, and nothing else.

What fits no template, or several, keeps what is certain; why it has no more is told as a remark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adapterkit.errors import PluginError
from adapterkit.mapping.block_order import is_arranged, most_told
from adapterkit.mapping.entries import Attention, Block, Entry
from adapterkit.mapping.expansion import points_of
from adapterkit.mapping.layers import layer_layout
from adapterkit.mapping.layouts import first_path, joined, module_at
from adapterkit.mapping.plain_layers import tags_of
from adapterkit.mapping.sites import block_sites, block_tags
from adapterkit.mapping.structure import named_base_modules
from adapterkit.mapping.templates import ATTENTIONS, BLOCKS, FEED_FORWARDS, AttentionTemplate, BlockTemplate, Template
from adapterkit.mapping.templates.heads import counted_heads
from adapterkit.mapping.templates.template import Templates
from adapterkit.points import AttentionPoint, InjectionPoint, Tag, WeightPoint

_CROSS = frozenset(
    {"encoder_attn", "cross_attn", "crossattention", "cross_attention", "multihead_attn", "EncDecAttention"}
)
"""What attentions to other tokens are called, in blocks that no template tells of."""

_SHARED = frozenset({"shared_expert", "shared_experts", "shared_mlp"})

_ATTENTIONS, _FEED_FORWARDS, _BLOCKS = Templates(ATTENTIONS), Templates(FEED_FORWARDS), Templates(BLOCKS)

_CONTRADICTIONS = (PluginError, AttributeError, StopIteration, ValueError, ZeroDivisionError)
"""What reading a module by a template may end in where its sizes are not what they are elsewhere."""

Refusal = Callable[[nn.Module], "str | None"]
"""Why the keys and values of a module cannot be reached, or None."""


@dataclass
class Recognised:
    """What was found.

    Attributes:
        points: The points, in no order.
        blocks: Paths of the blocks whose output is the residual stream.
        remarks: Path -> why there are no more points.
        called: Whether it is known that layers are called, and their weights read by nobody.
    """

    points: list[InjectionPoint] = field(default_factory=list[InjectionPoint])
    blocks: list[str] = field(default_factory=list[str])
    remarks: dict[str, str] = field(default_factory=dict[str, str])
    called: bool = False


@dataclass(frozen=True)
class _Found:
    """A module that a template is about."""

    path: str
    module: nn.Module
    template: Template


def recognise(
    model: nn.Module, component: str, refusal: Refusal, prefix: str = "", beside: Collection[int] = ()
) -> Recognised:
    """The points of every attention, feed-forward and block that a template fits.

    Args:
        model: The model.
        component: Tag of the points.
        refusal: Whether keys and values can be reached at a module that attends.
        prefix: What the model calls the bare model inside itself.
        beside: Ids of modules that are not looked into.
    """
    found, tree = Recognised(), dict(named_base_modules(model, seen=set(beside)))

    def places(blocks: Sequence[str], attentions: Sequence[str]) -> _Places:
        return _Places(_sites(blocks, attentions, prefix, named=component == "model"), component)

    _fill(found, tree, places, refusal)
    return found


@points_of.register
def _(entry: Block, block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]) -> list[InjectionPoint]:
    found, tree = Recognised(called=True), dict(named_base_modules(block, prefix=prefix))
    _fill(found, tree, lambda *_: _Places({prefix: site}, "", tags), lambda _: None)
    return [point for point in found.points if point.role not in entry.without.split()]


def _fill(
    found: Recognised,
    tree: Mapping[str, nn.Module],
    places_of: Callable[[Sequence[str], Sequence[str]], _Places],
    refusal: Refusal,
) -> None:
    """Finds what is in a tree of modules. `places_of` is told the paths of its blocks and of its attentions."""
    blocks = dict(_blocks(tree, found.remarks))
    attentions = [*_first_matches(tree, _ATTENTIONS)]
    places = places_of([*blocks], [one.path for one in attentions])
    for one in attentions:
        _add_attention(found, one, places, blocks, refusal)
    for one in _first_matches(tree, _FEED_FORWARDS):
        _add_feed_forward(found, one, places)
    for path, one in blocks.items():
        _add_block(found, one, places.site(path), places.tags(path))
    found.points = [*_apart(found.points)]


def _sites(blocks: Sequence[str], attentions: Sequence[str], prefix: str, *, named: bool) -> dict[str, str]:
    """Path of each block, and of what is numbered around an attention in none -> its site."""
    paths = set(blocks)
    paths |= {path for one in attentions if _block_around(one, blocks) is None and (path := _numbered(one))}
    # A user's own model may grow a second list of blocks: its names stay.
    return {path: path for path in paths} if named else block_sites(sorted(paths), prefix)


def _block_around(path: str, blocks: Collection[str]) -> str | None:
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return None


class _Places:
    """Which block a path lies in, and what that is called. `tags` are those of all, where they are known."""

    def __init__(self, sites: Mapping[str, str], component: str, tags: dict[str, Tag] | None = None) -> None:
        self._sites, self._component, self._tags = sites, component, tags

    def site(self, path: str) -> str:
        """That of the block around; the path itself where there is none."""
        block = _block_around(path, self._sites)
        return path if block is None else self._sites[block]

    def tags(self, path: str) -> dict[str, Tag]:
        if self._tags is not None:
            return self._tags
        block = _block_around(path, self._sites)
        if block is None:
            return tags_of(path, self._component)
        return {"component": self._component, **block_tags(block, self._sites[block])}

    def inside(self, path: str) -> str:
        """The path from the block around."""
        block = _block_around(path, self._sites)
        return "" if block is None else path[len(block) + 1 :]


def _numbered(path: str) -> str:
    """The nearest member of a list around a module, itself included."""
    while path and not path.rpartition(".")[2].isdigit():
        path = path.rpartition(".")[0]
    return path


def _first_matches(tree: Mapping[str, nn.Module], templates: Templates[Any]) -> Iterator[_Found]:
    """Modules with the first template that fits; none inside of one that was found."""
    taken: set[str] = set()
    for path, module in tree.items():
        if not module._modules or isinstance(module, nn.MultiheadAttention):
            continue
        if path.rpartition(".")[0] in taken and path:  # its layers are that one's already
            continue
        template = next((one for one in templates.fitting(module) if _is_of_layers(one, module)), None)
        if template is not None:
            yield _Found(path, module, template)
            taken.add(path)


def _is_of_layers(template: Template, module: nn.Module) -> bool:
    """Whether what the template takes for layers are some."""
    paths = [first_path(module, path) for path in template.has.split()]
    return all(path is not None and _is_layer(module_at(module, path)) for path in paths)


def _is_layer(module: nn.Module) -> bool:
    """Whether adapters can act in it; what has no parameters, such as a dropout, only tells structures apart."""
    return layer_layout(module) is not None or next(module.parameters(), None) is None


def _blocks(tree: Mapping[str, nn.Module], remarks: dict[str, str]) -> Iterator[tuple[str, _Found]]:
    for path, module in tree.items():
        fitting = [*_BLOCKS.fitting(module)]
        ordered = most_told([one for one in fitting if is_arranged(one, module)])
        if len(ordered) == 1:
            yield path, _Found(path, module, ordered[0])
        elif fitting:
            several = "several arrangements fit its children" if ordered else "its forward calls them in another order"
            remarks[path] = f"{type(module).__name__} has the children of a known block, and {several}: no outputs"


def _add_attention(
    found: Recognised, one: _Found, places: _Places, blocks: Mapping[str, _Found], refusal: Refusal
) -> None:
    template: AttentionTemplate = one.template  # type: ignore[assignment]
    site, tags = places.site(one.path), places.tags(one.path)
    weights = _points(template.entries, one, site, tags, found)
    sort = "cross" if _is_cross(weights) else _sort(one, places, blocks)
    for name, further in template.streams.items():
        place = f"{site}.{name}" if site else name
        weights += _points(further, one, place, {**tags, "stream": name}, found)
    weights = _sorted(weights, sort)
    found.points += weights
    at = joined(one.path, template.at)
    why, entry = _attention(template, one, weights, sort, refusal)
    if entry is None:
        found.remarks.setdefault(at, why)
    else:
        found.points += points_of(entry, one.module, one.path, site, tags)


def _attention(
    template: AttentionTemplate, one: _Found, weights: Sequence[InjectionPoint], sort: str, refusal: Refusal
) -> tuple[str, Attention | None]:
    attends = module_at(one.module, template.at)
    if template.refused:
        return f"{type(attends).__name__} {template.refused}", None
    if template.linear:
        return f"{type(attends).__name__} has no softmax over keys that more keys could join", None
    if (why := refusal(attends)) is not None:
        return why, None
    try:
        heads = template.heads(one.module) if template.heads else _counted(attends, weights, sort)
    except _CONTRADICTIONS as error:
        return _contradicted(one, error), None
    if heads is None:
        return f"{type(attends).__name__} does not tell how many heads it has", None
    return "", Attention(f"{sort}.kv", template.at, lambda _: heads)


def _counted(attends: nn.Module, weights: Sequence[InjectionPoint], sort: str) -> tuple[int, int, int] | None:
    widths = [next((one.out_features for one in weights if one.role == f"{sort}.{part}"), None) for part in "kv"]
    keys, values = widths
    return (
        None
        if keys is None or values is None
        else counted_heads(attends, keys, values, attends.__dict__.get("processor"))
    )


def _sort(one: _Found, places: _Places, blocks: Mapping[str, _Found]) -> str:
    """`cross` where the block's template says so, or the name of the module or of one around it in its block."""
    inside = places.inside(one.path) or one.path
    words = inside.split(".")
    block = blocks.get(one.path[: len(one.path) - len(inside) - 1])
    told = block.template.cross.split() if block is not None and isinstance(block.template, BlockTemplate) else ()
    return "cross" if any(word in told or word in _CROSS for word in words) else "attn"


def _is_cross(weights: Sequence[InjectionPoint]) -> bool:
    """Whether keys are made from tokens of another width than queries."""
    widths = {one.role.rpartition(".")[2]: one.in_features for one in weights}
    return "q" in widths and "k" in widths and widths["q"] != widths["k"]


def _add_feed_forward(found: Recognised, one: _Found, places: _Places) -> None:
    site, tags = places.site(one.path), places.tags(one.path)
    name = one.path.rpartition(".")[2]
    around = one.path.split(".")[:-1]
    if name in _SHARED:
        sort = "moe.shared"
    elif name.isdigit() and around and around[-1] == "experts":
        sort, site, tags = "moe", f"{site}.{name}", {**tags, "expert": int(name)}
    else:
        sort = "mlp"
    found.points += _sorted(_points(one.template.entries, one, site, tags, found), sort)


def _add_block(found: Recognised, one: _Found, site: str, tags: dict[str, Tag]) -> None:
    template: BlockTemplate = one.template  # type: ignore[assignment]
    outputs = _points(template.entries, one, site, tags, found)
    for name, further in template.streams.items():
        outputs += _points(further, one, f"{site}.{name}", {**tags, "stream": name}, found)
    found.points += outputs
    if template.whole and outputs and not any(output.channels_first for output in outputs):
        found.blocks.append(one.path)


def _points(
    entries: Sequence[Entry], one: _Found, site: str, tags: dict[str, Tag], found: Recognised
) -> list[InjectionPoint]:
    """The points of a template's entries; none of one that the module's shapes contradict."""
    made: list[InjectionPoint] = []
    for entry in entries:
        try:
            made += points_of(entry, one.module, one.path, site, tags)
        except _CONTRADICTIONS as error:
            found.remarks[one.path] = _contradicted(one, error)
    return made if found.called else [_as_accessed(point, one) for point in made]


def _contradicted(one: _Found, error: Exception) -> str:
    said = str(error) or type(error).__name__
    return f"{type(one.module).__name__} has the children of a known structure, and other shapes: {said}"


def _sorted(points: Sequence[InjectionPoint], sort: str) -> list[InjectionPoint]:
    """The points with the sort in their roles."""
    return [dataclasses.replace(point, role=point.role.replace("*", sort, 1)) for point in points]


def _as_accessed(point: InjectionPoint, one: _Found) -> InjectionPoint:
    """The point, where its layer may be read as well as called, if that cannot be seen from outside."""
    if not isinstance(point, WeightPoint) or point.layout.access != "call":
        return point
    layer = layer_layout(module_at(one.module, point.path[len(one.path) + 1 :] if one.path else point.path))
    if layer is None or layer[0].access == "call":
        return point
    return dataclasses.replace(point, layout=dataclasses.replace(point.layout, access=layer[0].access))


def _apart(points: Sequence[InjectionPoint]) -> Iterator[InjectionPoint]:
    """The points with ids that differ: of two sublayers of one role in a block, the second has its name in its site."""
    taken: set[str] = set()
    for point in points:
        told = point
        if point.id in taken:
            words = point.path.split(".")[: None if isinstance(point, AttentionPoint) else -1]
            name = next((word for word in reversed(words) if not word.isdigit()), "")
            told = dataclasses.replace(point, site=f"{point.site}.{name}")
        if told.id in taken:
            told = dataclasses.replace(point, site=point.path)
        if told.id not in taken:
            taken.add(told.id)
            yield told
