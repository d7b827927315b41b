"""RandLoRA: a full-rank update of random bases that all layers share (Albert et al. 2025, arXiv:2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ShapeMismatchError
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_MAX_RANK, _MAX_SEED, _MAX_ALPHA = 2**14, 2**63 - 1, 1e8
_SPARSE = ("no", "sparse", "very_sparse")


class Bases(nn.Module):
    """A [rank, 1, shorter] and B [longer, bases, rank], drawn from a seed as PEFT draws them; float32.

    `shorter` and `longer` are of the widest outputs and the widest inputs of all points, `bases` of rank `rank` fill
    the shorter. Files hold these sides, for who draws again must draw for the same.

    Args:
        sides: The widest outputs, the widest inputs.
        rank: Of a base.
        seed: Of a generator of their own.
        sparse: Whether the bases hold -1, 0 and 1 alone: "no", "sparse", "very_sparse".
        saved: Whether files hold the bases.
    """

    def __init__(self, sides: tuple[int, int], rank: int, seed: int, sparse: str, saved: bool) -> None:
        super().__init__()
        shorter, longer = min(sides), max(sides)
        bases = -(-shorter // rank)
        if torch.empty(0).is_meta:
            a, b = torch.empty(rank, 1, shorter), torch.empty(longer, bases, rank)
        else:
            generator = torch.Generator().manual_seed(seed)
            draw = _uniform if sparse == "no" else _ternary(3.0 if sparse == "sparse" else math.sqrt(shorter))
            a, b = draw((rank, 1, shorter), generator), draw((longer, bases, rank), generator)
        self.register_buffer("A", a, persistent=saved)
        self.register_buffer("B", b, persistent=saved)
        self.register_buffer("sides", torch.tensor(sides))
        self.own = list(sides)
        self.register_load_state_dict_post_hook(_check_sides)


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform for each base [rows, 1, columns], divided by their deviation: in bfloat16, as PEFT does."""
    rows, bases, columns = shape
    bound = 1 / math.sqrt(columns)
    each = [torch.empty(rows, 1, columns, dtype=torch.bfloat16, device="cpu") for _ in range(bases)]
    drawn = torch.cat([base.uniform_(-bound, bound, generator=generator) for base in each], dim=1)
    return (drawn / drawn.std()).float()


def _ternary(sparsity: float) -> Callable[[tuple[int, int, int], torch.Generator], Tensor]:
    """-1 and 1, each with a probability of 1 / (2 sparsity), and 0, divided by their deviation."""

    def draw(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        drawn = torch.rand(shape, generator=generator, device="cpu")
        signs = (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()
        return signs / signs.std()

    return draw


def _check_sides(module: nn.Module, incompatible: object) -> None:
    bases, sides = cast("Bases", module), cast("Tensor", module.sides)
    if not sides.is_meta and sides.tolist() != bases.own:
        told = f"the bases were drawn for sides {sides.tolist()}, and here they are {bases.own}: others would be drawn"
        raise ShapeMismatchError(told, None, "shared/sides")


class RandLoRAModule(ak.AdditiveModule):
    """`W + alpha / r * sum_n B_n diag(lambda_n) A diag(gamma_n)`, for a weight that has fewer inputs than outputs.

    Else the sum is transposed. `scale` is lambda [r, bases], `gamma` [bases, shorter side].
    """

    def __init__(self, point: ak.InjectionPoint, config: RandLoRA) -> None:
        super().__init__()
        self.shape, self.layout, self.factor = point.shape, point.layout, config.alpha / config.rank
        self.sides = (point.shape[0], math.prod(point.shape[1:]))
        bases = -(-min(self.sides) // config.rank)
        self.scale = nn.Parameter(torch.zeros(config.rank, bases))
        self.gamma = nn.Parameter(torch.full((bases, min(self.sides)), 1 / max(bases, min(self.sides))))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def product(self) -> ak.Factors:
        """The sum as factors of rank r * bases.

        PEFT numbers the columns of one side base by base and those of the other rank by rank, and so does this.
        """
        bases, shorter = self.gamma.shape
        short = (self.shared.A[..., :shorter].to(self.gamma) * self.gamma * self.scale.unsqueeze(-1)).flatten(0, 1)
        long = self.shared.B[: max(self.sides), :bases].to(self.gamma).flatten(1)
        down, up = (short, long) if self.sides[1] == shorter else (long.mT, short.mT)
        return ak.Factors(down.reshape(-1, *self.shape[1:]), up, self.layout, self.factor)

    def factors(self) -> ak.Factors | None:
        return None if self.training and isinstance(self.dropout, nn.Dropout) else self.product()

    def delta(self, x: Tensor) -> Tensor:
        return low_rank.update(self.dropout(x), self.product())

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


@dataclass(frozen=True)
class RandLoRA(ak.AdapterConfig):
    """An update of full rank from frozen random bases that all layers share, each with learnt diagonals.

    Attributes:
        rank: Of a base: the smaller it is, the more numbers are learnt.
        alpha: The update is scaled by alpha / rank.
        dropout: Probability of zeroing an element of the input in training.
        sparse: Bases of -1, 0 and 1: "no", "sparse" (a third is not 0) or "very_sparse".
        seed: Of the bases.
        save_bases: Whether files hold them; otherwise they are drawn again from the seed.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t", "conv"})
    common: ClassVar[frozenset[str]] = frozenset({"rank", "sparse", "seed", "save_bases"})
    targets: str = "attention"
    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0
    sparse: str = "no"
    seed: int = 0
    save_bases: bool = True

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if abs(self.alpha) > _MAX_ALPHA:
            found.append(f"alpha must be within {_MAX_ALPHA:g}, not {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        if self.sparse not in _SPARSE:
            found.append(f"sparse must be one of {', '.join(_SPARSE)}, not {self.sparse!r}")
        if not 0 <= self.seed <= _MAX_SEED:
            found.append(f"seed must be from 0 to {_MAX_SEED}, not {self.seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        if point.cuts_groups:
            return "RandLoRA acts on whole grouped convolutions"
        if point.is_read and self.dropout:
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return None

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, point.layout, self.rank, self.alpha, self.dropout)

    def build(self, point: ak.InjectionPoint) -> RandLoRAModule:
        return RandLoRAModule(point, self)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Bases:
        outputs = max(point.out_features for point in points)
        inputs = max(math.prod(point.shape[1:]) for point in points)
        return Bases((outputs, inputs), self.rank, self.seed, self.sparse, self.save_bases)
