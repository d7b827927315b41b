"""What a template is: entries for a module that has certain children, whatever its class and wherever it hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from adapterkit.errors import PluginError
from adapterkit.mapping.entries import Entry
from adapterkit.mapping.layers import base_children
from adapterkit.mapping.layouts import first_path

Heads = Callable[[Any], "tuple[int, int] | tuple[int, int, int]"]
"""(kv_heads, head_dim) or (kv_heads, head_dim, value_dim) of an attention module."""


@dataclass(frozen=True)
class Template:
    """Entries where a module has certain children.

    A role that begins with `*` gets the sort of the sublayer in its place: `attn` or `cross`, `mlp` or `moe`.

    Attributes:
        has: Paths of children that are all there, separated by spaces; of each, alternatives separated by `|`.
        entries: What is where, relative to the module.
        without: Paths of which none is there.
        streams: Further entries, of a second stream of tokens: its name -> entries. They have the name as a tag and
            behind their site.
        when: What else must hold of the module: attributes that tell how a layer is split.
    """

    has: str
    entries: tuple[Entry, ...] = ()
    without: str = ""
    streams: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict[str, tuple[Entry, ...]])
    when: Callable[[Any], bool] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.has.split():
            raise PluginError("a template must say which children a module has, such as Template('q_proj k_proj', ...)")

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has what it must, and nothing that it must not."""
        here = all(first_path(module, path) is not None for path in self.has.split())
        strange = any(first_path(module, path) is not None for path in self.without.split())
        return here and not strange and (self.when is None or self.when(module))


@dataclass(frozen=True)
class AttentionTemplate(Template):
    """The projections of an attention.

    Attributes:
        at: Path of the module whose forward attends, from the one with these children; empty for that one.
        heads: Of the keys; None to count them on the layer that makes keys.
        linear: Whether there is no softmax over keys, so that nothing can be put in front of them.
        refused: Why keys and values of such modules cannot be reached, where it is not that.
    """

    at: str = ""
    heads: Heads | None = None
    linear: bool = False
    refused: str = ""


@dataclass(frozen=True)
class BlockTemplate(Template):
    """The sublayers of a block: `Output` entries; `has` are their modules and norms.

    A block that has further children with parameters is not matched.

    Attributes:
        optional: Children that may be there too.
        cross: Children that are attentions to other tokens.
        whole: Whether the block takes the residual stream first, and gives it back alone or first.
        order: Children that its forward calls one after the other, where entries do not tell.
        names: What its forward names: one of these, such as a function that takes windows apart.
        unless: What its forward does not name, none of these.
        branches: Whether the forward has a branch for each of several arrangements, so that the order of calls in it
            does not tell which holds; `when` does.
    """

    optional: str = ""
    cross: str = ""
    whole: bool = True
    order: str = ""
    names: str = ""
    unless: str = ""
    branches: bool = False

    def matches(self, module: nn.Module) -> bool:
        return super().matches(module) and not self._strange(module)

    def _strange(self, module: nn.Module) -> list[str]:
        known = {path.partition(".")[0] for path in f"{self.has} {self.optional}".replace("|", " ").split()}
        return [
            name
            for name, child in base_children(module)
            if name not in known and next(child.parameters(), None) is not None
        ]


T = TypeVar("T", bound=Template)


class Templates(Generic[T]):
    """Templates in their order, found by the names of a module's children first: most modules have none of them."""

    def __init__(self, templates: Sequence[T]) -> None:
        self._roots = [(_roots(template), template) for template in templates]
        self._known: dict[tuple[str, ...], tuple[T, ...]] = {}

    def fitting(self, module: nn.Module) -> Iterator[T]:
        """Those that match a module."""
        names = tuple(module._modules.keys())  # a scripted module's have no iterator
        plausible = self._known.get(names)
        if plausible is None:
            plausible = tuple(one for roots, one in self._roots if all(not root.isdisjoint(names) for root in roots))
            self._known[names] = plausible
        return (template for template in plausible if template.matches(module))


def _roots(template: Template) -> list[frozenset[str]]:
    """The children of which one must be there, for each path."""
    return [frozenset(one.partition(".")[0] for one in path.split("|")) for path in template.has.split()]
