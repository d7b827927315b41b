"""VB-LoRA: the factors of all layers are mixed from one bank of vectors (Li et al. 2024, arXiv:2405.15179)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_MAX_RANK, _MAX_VECTORS, _MAX_START = 2**12, 2**16, 1e4


class VectorBank(nn.Module):
    """`vectors` [number, length], uniform within a bound."""

    def __init__(self, number: int, length: int, bound: float) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(number, length).uniform_(-bound, bound))


class VBLoRAModule(ak.AdditiveModule):
    """`W + B A`: every piece of a row of A, and of a column of B, is a mixture of k vectors of the bank.

    `logits_A` [rank, in / length, number] and `logits_B` [out / length, rank, number] say of which: the k largest, by
    their softmax.
    """

    def __init__(self, point: ak.InjectionPoint, config: VBLoRA) -> None:
        super().__init__()
        self.shape, self.layout, self.k = point.shape, point.layout, config.k
        rows, columns = point.shape[0] // config.length, math.prod(point.shape[1:]) // config.length
        self.logits_A = nn.Parameter(_drawn((config.rank, columns, config.vectors), config.logits_std))
        self.logits_B = nn.Parameter(_drawn((rows, config.rank, config.vectors), config.logits_std))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def mixtures(self) -> tuple[Tensor, Tensor]:
        """The pieces of A [rank, in / length, length], and of B [out / length, rank, length]."""
        return self._mixed(*chosen(self.logits_A, self.k)), self._mixed(*chosen(self.logits_B, self.k))

    def _mixed(self, weights: Tensor, indices: Tensor) -> Tensor:
        return (weights.unsqueeze(-1) * self.shared.vectors.to(weights)[indices]).sum(-2)

    def product(self) -> ak.Factors:
        """A [rank, in / groups, *kernel] and B [out, rank]."""
        a, b = self.mixtures()
        return ak.Factors(a.reshape(-1, *self.shape[1:]), b.mT.flatten(0, 1), self.layout)

    def factors(self) -> ak.Factors | None:
        return None if self.training and isinstance(self.dropout, nn.Dropout) else self.product()

    def delta(self, x: Tensor) -> Tensor:
        return low_rank.update(self.dropout(x), self.product())

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


class ChosenVBLoRAModule(VBLoRAModule):
    """VB-LoRA whose vectors are chosen: `indices_*` and the weights of all but the last, which adds up to 1; frozen."""

    def __init__(self, point: ak.InjectionPoint, config: VBLoRA) -> None:
        super().__init__(point, config)
        for name in "AB":
            logits = getattr(self, f"logits_{name}").detach()
            delattr(self, f"logits_{name}")
            indices = torch.empty(*logits.shape[:-1], config.k, dtype=torch.int64)
            weights = torch.empty(*logits.shape[:-1], config.k - 1)
            if not logits.is_meta:
                every, indices = chosen(logits, config.k)
                weights.copy_(every[..., :-1])
            self.register_buffer(f"indices_{name}", indices)
            self.register_buffer(f"weights_{name}", weights)

    def mixtures(self) -> tuple[Tensor, Tensor]:
        a, b = (self._mixed(self._weights(name), cast("Tensor", getattr(self, f"indices_{name}"))) for name in "AB")
        return a, b

    def _weights(self, name: str) -> Tensor:
        first = cast("Tensor", getattr(self, f"weights_{name}"))
        return torch.cat((first, 1 - first.sum(-1, keepdim=True)), -1)


def _drawn(shape: tuple[int, ...], std: float) -> Tensor:
    """Normal numbers; nothing is drawn on the meta device, for which torch would import hundreds of modules."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_(std=std)


def chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The weights of the k largest logits, and their places: each [..., k]."""
    largest, indices = logits.topk(k, dim=-1)
    return largest.softmax(-1), indices


@dataclass(frozen=True)
class VBLoRA(ak.AdapterConfig):
    """LoRA whose factors are mixtures of the vectors of one bank, which all layers share. It starts at random.

    Attributes:
        rank: Of the update.
        vectors: Number of vectors in the bank.
        length: Of a vector; it divides the inputs and the outputs of every point.
        k: Vectors in a mixture.
        dropout: Probability of zeroing an element of the input in training.
        chosen: Whether the choice of vectors is final, as in files for inference: the bank alone can be trained.
        bank_bound: The bank starts uniform within this.
        logits_std: Deviation of the logits at the start.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    neutral: ClassVar[bool] = False
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t", "conv"})
    common: ClassVar[frozenset[str]] = frozenset({"vectors", "length", "bank_bound"})
    targets: str = "attention"
    rank: int = 4
    vectors: int = 256
    length: int = 256
    k: int = 2
    dropout: float = 0.0
    chosen: bool = False
    bank_bound: float = 0.02
    logits_std: float = 0.1

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        for name in ("vectors", "length"):
            if not 1 <= getattr(self, name) <= _MAX_VECTORS:
                found.append(f"{name} must be from 1 to {_MAX_VECTORS}, not {getattr(self, name)!r}")
        if not 1 <= self.k <= self.vectors:
            found.append(f"k must be from 1 to vectors = {self.vectors}, not {self.k!r}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        for name in ("bank_bound", "logits_std"):
            if not 0 < getattr(self, name) <= _MAX_START:
                found.append(f"{name} must be more than 0 and at most {_MAX_START:g}, not {getattr(self, name)!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.cuts_groups:
            return "VB-LoRA acts on whole grouped convolutions"
        sides = (point.shape[0], math.prod(point.shape[1:]))
        if math.gcd(*sides) % self.length:
            return f"length {self.length} does not divide both sides of its weight {sides}"
        if point.is_read and self.dropout:
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return None

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, point.layout, self.rank, self.vectors, self.length, self.k, self.dropout, self.chosen)

    def build(self, point: ak.InjectionPoint) -> VBLoRAModule:
        return (ChosenVBLoRAModule if self.chosen else VBLoRAModule)(point, self)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> VectorBank:
        return VectorBank(self.vectors, self.length, self.bank_bound)
