"""What types share whose update is written down as a whole weight."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels.weights import call_weight
from adapterkit.points import Kind
from adapterkit_lycoris.decomposed import SIDES, Decomposed

_MAX_RANK, _MAX_SCALE = 2**12, 1e4


class DenseUpdate(ak.AdditiveModule):
    """`base(x) + layer(x)`, where the layer has the update for its weight; subclasses say what `delta_weight` is.

    Args:
        point: Where.
        dropout: Of the input, in training.
        module_dropout: Probability of dropping the whole update, in training.
    """

    def __init__(self, point: ak.InjectionPoint, dropout: float = 0.0, module_dropout: float = 0.0) -> None:
        super().__init__()
        self.layout = point.layout
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.module_dropout = module_dropout

    @property
    def dropping(self) -> bool:
        """Whether a part of the update is dropped now."""
        return self.training and bool(self.module_dropout or isinstance(self.dropout, nn.Dropout))

    def delta(self, x: Tensor) -> Tensor:
        y = self.effect(x if self.layout.form == "embedding" else self.dropout(x))
        if self.training and self.module_dropout:
            y = y * (torch.rand((), device=y.device) >= self.module_dropout)
        return y

    def effect(self, x: Tensor) -> Tensor:
        """What is added, dropout aside."""
        weight = self.delta_weight()
        if self.layout.form != "embedding":
            weight = weight.to(x.dtype)
        return call_weight(x, weight, None, self.layout)


@dataclass(frozen=True)
class DenseConfig(ak.AdapterConfig):
    """Rank, scale and dropouts of such types.

    Attributes:
        rank: Of the factors.
        alpha: The update is scaled by alpha / rank; None means by 1.
        dropout: Probability of zeroing an element of the input in training.
        module_dropout: Probability of dropping a point's whole update in training.
        decompose: "output" gives what the weight becomes a magnitude for each of its outputs, "input" for each of its
            inputs (DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5); None for neither.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    module_dropout: float = 0.0
    decompose: str | None = None

    @property
    def scale(self) -> float:
        """The factor on the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        elif abs(self.scale) > _MAX_SCALE:
            found.append(f"alpha / rank must be within {_MAX_SCALE:g}, not {self.alpha!r} / {self.rank}")
        for name in ("dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} must be at least 0 and less than 1, not {getattr(self, name)!r}")
        if self.decompose not in (None, *SIDES):
            found.append(f"decompose must be None, output or input, not {self.decompose!r}")
        elif self.decompose and (self.dropout or self.module_dropout):
            found.append("a decomposed weight has no dropout of its update")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "it acts on whole grouped convolutions"
        if point.is_read and (self.dropout or self.module_dropout):
            return "the model reads this weight, whose input dropout cannot reach: set every dropout to 0 here"
        if self.decompose and (point.in_span is not None or point.form == "embedding"):
            return "decompose scales all that a layer gives of features: neither an embedding nor a part of the inputs"
        if self.decompose == "input" and point.span is not None:
            return "decompose='input' needs all outputs of a layer, and this point is a part of them"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        update = self.update(point)
        return update if self.decompose is None else Decomposed(point, update, self.decompose)

    @abstractmethod
    def update(self, point: ak.InjectionPoint) -> DenseUpdate:
        """The module of the update itself."""


def wide(tensor: Tensor) -> Tensor:
    """In a dtype in which products can be summed: what a file holds in half precision is not multiplied in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def kernel_of(point: ak.InjectionPoint) -> tuple[int, ...]:
    """The convolution's kernel, where it is more than one number; empty elsewhere."""
    kernel = point.shape[2:]
    return kernel if any(size > 1 for size in kernel) else ()
