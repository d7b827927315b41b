"""VeRA: frozen random projections for all layers, and two vectors for each (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ShapeMismatchError
from adapterkit.kernels import low_rank
from adapterkit.points import Kind

_MAX_RANK, _MAX_SEED, _MAX_START = 2**14, 2**63 - 1, 1e4


class Projections(nn.Module):
    """A [rank, widest input] and B [widest output, rank], drawn from a seed: Kaiming's uniform, in float32.

    The widths are saved: matrices that are drawn again must be as wide as they were.

    Args:
        inputs, outputs: The widest of all points.
        rank: Of both.
        seed: Of a generator of their own, so that whoever loads a file without them draws the same.
        saved: Whether files hold them.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            self.register_buffer(name, _drawn(shape, generator), persistent=saved)
        self.register_buffer("widths", torch.tensor([inputs, outputs]))
        self.register_load_state_dict_post_hook(_check_widths)


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    empty = torch.empty(shape, dtype=torch.float32)  # on the default device: nothing is drawn on the meta device
    bound = math.sqrt(6 / shape[1])
    return empty if empty.is_meta else empty.uniform_(-bound, bound, generator=generator)


def _check_widths(module: nn.Module, incompatible: object) -> None:
    widths, found = (
        cast("Tensor", module.widths),
        [cast("Tensor", module.A).shape[1], cast("Tensor", module.B).shape[0]],
    )
    if not widths.is_meta and widths.tolist() != found:
        told = f"the projections were drawn for widths {widths.tolist()}, and here they are {found}"
        raise ShapeMismatchError(f"{told}: other numbers would be drawn", None, "shared/widths")


class VeRAModule(ak.AdditiveModule):
    """`base(x) + b * B (d * A x)`: d [rank] starts at `d_initial`, b [out] at zero."""

    def __init__(self, point: ak.InjectionPoint, rank: int, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.shape, self.layout = point.shape, point.layout
        self.d = nn.Parameter(torch.full((rank,), float(d_initial)))
        self.b = nn.Parameter(torch.zeros(point.out_features))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def product(self) -> ak.Factors:
        """This point's A [rank, in / groups, *kernel] and `b * B * d` [out, rank]."""
        out, *rest = self.shape
        a = self.shared.A[:, : math.prod(rest)].to(self.d).view(-1, *rest)
        return ak.Factors(a, self.b[:, None] * self.shared.B[:out].to(self.d) * self.d, self.layout)

    def factors(self) -> ak.Factors | None:
        return None if self.training and isinstance(self.dropout, nn.Dropout) else self.product()

    def delta(self, x: Tensor) -> Tensor:
        return low_rank.update(self.dropout(x), self.product())

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


@dataclass(frozen=True)
class VeRA(ak.AdapterConfig):
    """`W + diag(b) B diag(d) A` with A and B random, frozen and shared: rank + out numbers for each layer.

    Attributes:
        rank: Of the projections; large, for it costs little.
        d_initial: Where d starts.
        dropout: Probability of zeroing an element of the input in training.
        projection_seed: Of A and B.
        save_projection: Whether files hold A and B; otherwise they are drawn again from the seed.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    common: ClassVar[frozenset[str]] = frozenset({"rank", "projection_seed", "save_projection"})
    targets: str = "attention"
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0
    save_projection: bool = True

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        if not 0 < abs(self.d_initial) <= _MAX_START:
            found.append(
                f"d_initial must not be 0, where nothing trains, and within {_MAX_START:g}, not {self.d_initial!r}"
            )
        if not 0 <= self.projection_seed < _MAX_SEED:
            found.append(f"projection_seed must be from 0 to {_MAX_SEED - 1}, not {self.projection_seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.form == "embedding":
            return "VeRA projects features, and an embedding takes indices; use LoRA"
        if point.cuts_groups:
            return "VeRA acts on whole grouped convolutions"
        if point.is_read and self.dropout:
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> VeRAModule:
        return VeRAModule(point, self.rank, self.d_initial, self.dropout)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Projections:
        inputs = max(math.prod(point.shape[1:]) for point in points)
        outputs = max(point.out_features for point in points)
        return Projections(inputs, outputs, self.rank, self.projection_seed, self.save_projection)
