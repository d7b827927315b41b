"""What a format may ask about the model that an adapter is read for, or written from. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.points import InjectionPoint


@dataclass(frozen=True)
class ComponentView:
    """One mapped model.

    Attributes:
        name: As `InjectionPoint.model` of its points says it: `unet`, `text_encoder`, `language`.
        classes: Its class and those that it derives from, as `package:Class`, most derived first.
        config: The model's own configuration as JSON values; empty where it has none.
        paths: The dotted path of every module of the base, in model order; "" is the model itself.
    """

    name: str
    classes: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[str, ...] = ()


class ModelView(Protocol):
    """The model at hand: its components, and the values of its weights."""

    @property
    def components(self) -> Mapping[str, ComponentView]:
        """The models by name, in the order of the pipeline. What is a component inside one is none of them."""
        raise NotImplementedError

    def values(self, point: InjectionPoint) -> tuple[Tensor, Tensor | None]:
        """The base's weight at a point, shaped as the point says, and its bias [out] or None: float32 or wider.

        Raises:
            IncompatibleTargetError: There is no dense floating-point weight, or it has no values here (meta device).
        """
        raise NotImplementedError
