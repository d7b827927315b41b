"""Several model families in one backend: which table of points belongs to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from adapterkit.backends.family import Group, is_class
from adapterkit.errors import UnsupportedModelError


@dataclass(frozen=True)
class Table:
    """The models that share one layout.

    Attributes:
        classes: Base classes in transformers whose models have this layout.
        groups: Where their points are.
    """

    classes: tuple[str, ...]
    groups: tuple[Group, ...]


def groups_of(model: nn.Module, tables: Sequence[Table], backend: str) -> tuple[Group, ...]:
    """The groups of the table that lists one of the model's classes.

    Args:
        model: What is to be mapped.
        tables: The backend's tables.
        backend: The backend's registered name, for the error.

    Raises:
        UnsupportedModelError: No table lists it.
    """
    for table in tables:
        if any(is_class(model, "transformers", name) for name in table.classes):
            return table.groups
    known = ", ".join(name for table in tables for name in table.classes)
    raise UnsupportedModelError(
        f"the {backend} backend does not know {type(model).__name__}: it maps models derived from {known}; "
        "leave out backend= to let adapterkit choose"
    )
