"""Ties that others make again while adapters are merged: what was one weight is several until `unmerge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from adapterkit.errors import StateError
from adapterkit.handle.places import found_at
from adapterkit.handle.stand_ins import Original
from adapterkit.mapping.structure import base_modules


@dataclass(frozen=True)
class _Tie:
    """Where the parameters are that were one, and how many they are now."""

    places: Sequence[tuple[nn.Module, str, str]]
    count: int


class Ties:
    """The parameters of some models that were tied before a merge, and are not while it lasts.

    Args:
        roots: The models.
        originals: What the merge has replaced.
    """

    def __init__(self, roots: Sequence[nn.Module], originals: Sequence[Original]) -> None:
        was = {id(new): id(old) for original in originals for new, old in original.pairs if old is not None}
        was |= {old: old for old in was.values()}
        names = {id(module): (root, path) for root in roots for path, module in root.named_modules()}
        places: dict[int, list[tuple[nn.Module, str, str]]] = {}
        held: dict[int, set[int]] = {}
        for module in base_modules(roots):
            for name, parameter in module._parameters.items():
                if id(parameter) in was:
                    places.setdefault(was[id(parameter)], []).append((*names[id(module)], name))
                    held.setdefault(was[id(parameter)], set()).add(id(parameter))
        self._ties = [_Tie(places[key], len(ids)) for key, ids in held.items() if len(ids) > 1]

    def check(self) -> None:
        """Looks whether they still are apart.

        Raises:
            StateError: They are not: one of them is not what the merge has made of it.
        """
        for tie in self._ties:
            present = [getattr(found_at(root, path), name, None) for root, path, name in tie.places]
            if len({*map(id, present)}) < tie.count:
                of = " and ".join(f"{path}.{name}" for _, path, name in tie.places)
                raise StateError(
                    f"{of} were tied again (tie_weights, resize_token_embeddings?) while adapters are merged into them "
                    "apart: unmerge() makes them what they were, and merge() can follow"
                )
