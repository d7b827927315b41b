"""What a family of transformers' models is: its classes, its table of points, and how its attention is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import AttentionSeam, Backend, Lengthening, Reach
from adapterkit.backends.counted import moved_positions, own_positions
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.backends.transformers_ties import untying
from adapterkit.contract.layouts import Repeats
from adapterkit.errors import UnsupportedModelError
from adapterkit.mapping.everywhere import prompt_layer_points, prompt_points
from adapterkit.mapping.family import Block, Entry, Group, is_class, resolve
from adapterkit.mapping.layouts import joined
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint

if TYPE_CHECKING:
    from torch import nn


def _any_config(config: Any) -> bool:
    return True


def _counts(model: nn.Module, path: str) -> str | None:
    """The path of the module around one that makes positions for what is in it."""
    while path:
        path = path.rpartition(".")[0]
        if hasattr(model.get_submodule(path), "get_input_embeddings"):
            return path
    return None


@dataclass(frozen=True)
class Family:
    """The models that share one layout.

    Attributes:
        classes: Classes in transformers; models derived from one of them are of this family.
        groups: Where its points are.
        seam: How its attention is reached.
        when: Which of these models, by their config, where the config chooses between layouts.
        lengthening: How the module `beside` runs on a longer sequence; None where none can.
        rotary: Whether its tokens know distances alone, by rotary embeddings.
        hides: Whether a boolean mask of its blocks is True at what is hidden.
        beside: Path of that module from the one that holds the embedding; empty for that one. If it is another one, it
            only runs its blocks, and each of them can run on a longer sequence of its own.
    """

    classes: tuple[str, ...]
    groups: tuple[Group, ...]
    seam: type[AttentionSeam] = TransformersAttentionSeam
    when: Callable[[Any], bool] = _any_config
    lengthening: Lengthening | None = None
    rotary: bool = False
    hides: bool = False
    beside: str = ""


def stacked(
    inside: str, stem: Sequence[Entry], blocks: str, head: Sequence[Entry], *further: Entry, site: str = "{layer}"
) -> tuple[Group, ...]:
    """The groups of a model with a stem, blocks as the templates say, and a head.

    Args:
        inside: Paths of the bare model in one that has a head, separated by spaces.
        stem: What is in the bare model.
        blocks: Paths of its blocks, as the pattern of a `Group`.
        head: What is around the bare model.
        *further: What is special of the blocks.
        site: That of a block.
    """
    roots = (*inside.split(), "")
    pattern = "|".join(joined(root, path) for root in roots for path in blocks.split("|"))
    return Group("|".join(roots), "", (*stem,)), Group(pattern, site, (Block(), *further)), Group("", "", (*head,))


class FamilyBackend(Backend):
    """A backend of several families.

    Attributes:
        name: What it is registered as, for errors.
        generates: Whether there are models that generate among them, with several rows for a sample.
        families: Of several with the same classes, the first whose `when` holds is a model's.
    """

    writes = ("save_pretrained",)
    whole_blocks = True
    name: ClassVar[str]
    generates: ClassVar[bool] = False
    families: ClassVar[tuple[Family, ...]]

    def family(self, model: nn.Module) -> Family:
        """The family whose class is among the model's classes, and whose layout its config names.

        Raises:
            UnsupportedModelError: There is none.
        """
        for family in self.families:
            if any(is_class(model, "transformers", name) for name in family.classes) and family.when(model.config):
                return family
        known = ", ".join(dict.fromkeys(name for family in self.families for name in family.classes))
        raise UnsupportedModelError(
            f"the {self.name} backend does not know {type(model).__name__}: it maps models derived from {known}; "
            "leave out backend= to let adapterkit choose"
        )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        family = self.family(model)
        found = resolve(model, family.groups, component)
        causal = family.beside and getattr(model.config, "is_decoder", False)  # BERT: no token would see what is behind
        if family.lengthening is None or causal:
            return found
        deep = prompt_layer_points(model, found) if family.beside else []
        return [*found, *prompt_points(model, found, family.beside), *deep]

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        return "each" if self.generates and point.role != "embed.pos" else None  # positions are those of all rows

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            family = self.family(model)
            how = own_positions if family.rotary else moved_positions
            counting = {path: how for path in [_counts(model, point.path)] if path is not None}
            return Reach(seam=family.seam(), counting=counting)
        if point.role in ("prompt", "prompt.layer"):
            family = self.family(model)
            path = _counts(model, point.path) if family.beside and point.role == "prompt" else None
            return Reach(lengthening=family.lengthening, counting={} if path is None else {path: moved_positions})
        return Reach(hides=self.family(model).hides) if isinstance(point, OutputPoint) else Reach()
