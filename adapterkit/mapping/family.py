"""A model family as data: which roles are at which paths, resolved on the live module tree.

Paths are relative, and list alternatives separated by `|`, so that a module that the next release of a library renames
is one more word here. Nothing is run and no weight is read: resolving works on the meta device.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import nn

from adapterkit.errors import PluginError
from adapterkit.mapping.entries import (
    Attention,
    Block,
    Entry,
    Experts,
    Fused,
    FusedInput,
    Output,
    Read,
    Tokens,
    Weight,
    equal_parts,
    grouped_heads,
)
from adapterkit.mapping.layouts import first_path, is_class, weight_layout
from adapterkit.mapping.parts import in_order
from adapterkit.mapping.recognition import points_of
from adapterkit.points import InjectionPoint, Tag

__all__ = [
    "Attention",
    "Block",
    "Entry",
    "Experts",
    "Fused",
    "FusedInput",
    "Group",
    "Output",
    "Read",
    "Tokens",
    "Weight",
    "equal_parts",
    "first_path",
    "grouped_heads",
    "is_class",
    "resolve",
    "weight_layout",
]


_WORD = re.compile(r"\{[a-zA-Z_]\w*\}")


def _names_in(text: str) -> set[str] | None:
    """The placeholders of a pattern or site; None where the braces do not match."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return None


@dataclass(frozen=True)
class Group:
    """Entries that recur at every match of a pattern.

    Attributes:
        pattern: Alternatives; `{name}` stands for an index and becomes a tag: `model.layers.{layer}|layers.{layer}`.
            The empty string is the model itself.
        site: Where the points lie in canonical words: `{layer}`, `down.{block}.{index}`.
        entries: What is there. An entry whose paths do not exist in a block is absent there.
        tags: Further tags, such as `stage`.

    Raises:
        PluginError: Something of it cannot be used.
    """

    pattern: str
    site: str
    entries: tuple[Entry, ...]
    tags: dict[str, Tag] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise PluginError(f"Group {self.pattern!r}: {problem}")

    def _problem(self) -> str | None:
        if not isinstance(self.pattern, str) or not isinstance(self.site, str):
            return f"pattern and site must be strings, not {self.site!r}"
        wanted = _names_in(self.site)
        for alternative in self.pattern.split("|"):
            names = _names_in(alternative)
            if names is None or not all(_WORD.fullmatch(part) for part in alternative.split(".") if "{" in part):
                return f"{alternative!r} must be names joined by dots, some of them like {{layer}}"
            if wanted is None or not wanted <= names:
                known = ", ".join(f"{{{name}}}" for name in sorted(names)) or "none"
                return f"the site {self.site!r} must be made of the placeholders of {alternative!r} ({known})"
        if not isinstance(self.entries, (tuple, list)):
            return f"entries must be a tuple, not {self.entries!r}; for a single one write (Weight(...),)"
        strange = [entry for entry in self.entries if not isinstance(entry, get_args(Entry))]
        return f"{strange[0]!r} is no entry, such as Weight('attn.q', 'q_proj')" if strange else None


def resolve(model: nn.Module, groups: Sequence[Group], component: str) -> list[InjectionPoint]:
    """The points of all groups, in the order of the module tree."""
    points: list[InjectionPoint] = []
    for group in groups:
        for prefix, indices in _blocks(model, group.pattern):
            block = model.get_submodule(prefix)
            tags: dict[str, Tag] = {"component": component, **group.tags, **indices}
            site = group.site.format(**indices)
            points += _points(group.entries, block, prefix, site, tags)
    return in_order(points, model)


def _points(
    entries: Sequence[Entry], block: nn.Module, prefix: str, site: str, tags: dict[str, Tag]
) -> list[InjectionPoint]:
    """Those of all entries, in their order; what the templates say of a block is less than what is said beside."""
    found = [(entry, point) for entry in entries for point in points_of(entry, block, prefix, site, tags)]
    said = {point.id for entry, point in found if not isinstance(entry, Block)}
    return [point for entry, point in found if not (isinstance(entry, Block) and point.id in said)]


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
