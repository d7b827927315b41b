"""Which rank an update needs: by energy, ratio or error of its singular values; and what each rank would lose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.contract.fields import is_number
from adapterkit.errors import ConfigError, shown
from adapterkit.points import InjectionPoint

_SHARES = ("energy", "error")


@dataclass(frozen=True)
class RankRule:
    """How many singular values of an update are kept; at least one.

    Attributes:
        rank: At most so many; so many where nothing else is said.
        energy: So many that their squares are at least this part of the sum of the squares of all, from 0 to 1.
        ratio: Those that are at least the largest divided by this.
        error: So many that what is left out has at most this part of the update's norm.
        conv_rank: In the place of `rank` for convolutions with a kernel larger than 1.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    error: float | None = None
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                problems.append(f"{name} must be an int from 1, not {shown(value)}")
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                problems.append(f"{name} must be more than 0 and at most 1, not {shown(value)}")
        if self.ratio is not None and not (is_number(self.ratio) and self.ratio >= 1):
            problems.append(f"ratio must be at least 1, not {shown(self.ratio)}")
        given = [name for name in (*_SHARES, "ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            problems.append(f"give one of energy, error and ratio, not {' and '.join(given)}")
        if not given and self.rank is None:
            problems.append("give a rank, an energy, a ratio or an error")
        if problems:
            raise ConfigError(problems, "ranks")

    @property
    def fixed(self) -> bool:
        """Whether the rank depends on nothing but the point."""
        return self.energy is None and self.ratio is None and self.error is None

    def most(self, point: InjectionPoint) -> int | None:
        """The highest rank that a point may have."""
        wide = math.prod(point.shape[2:]) > 1
        return self.conv_rank if wide and self.conv_rank is not None else self.rank

    def of(self, values: Tensor, total: float, point: InjectionPoint) -> int | None:
        """The rank of a point; None where it takes more singular values to say.

        Args:
            values: The first singular values, descending.
            total: The sum of the squares of all.
            point: Where.
        """
        most = self.most(point)
        wanted = most if self.fixed else self._wanted(values, total)
        if wanted is None or (most is not None and wanted > most):
            wanted = most if most is not None and most <= len(values) else None
        return None if wanted is None else max(min(wanted, len(values)), 1)

    def _wanted(self, values: Tensor, total: float) -> int | None:
        if total == 0:
            return 1
        if self.ratio is not None:
            small = values * self.ratio < values[0]
            return int(small.int().argmax()) if small.any() else None
        share = self.energy if self.energy is not None else 1 - (self.error or 0) ** 2
        reached = values.double().square().cumsum(0) >= share * (1 - 1e-12) * total
        return int(reached.int().argmax()) + 1 if reached.any() else None


@dataclass(frozen=True)
class Spectrum:
    """The singular values of what an adapter adds at one point.

    Attributes:
        point: Where.
        values: Descending; of a low-rank update all that are not 0.
        rank: Of the update as it is kept.
    """

    point: InjectionPoint
    values: Tensor
    rank: int

    def error(self, rank: int) -> float:
        """The norm of what a lower rank leaves out."""
        return float(self.values[rank:].double().norm())

    @property
    def norm(self) -> float:
        """Of the whole update."""
        return float(self.values.double().norm())


@dataclass(frozen=True)
class RankError:
    """What one rank at every point would lose, relative to the norm of the update.

    Attributes:
        rank: At most so many at every point.
        error: Of all points together.
        worst: Of the point where it is largest.
        where: That point's id.
        parameters: Of all factors.
    """

    rank: int
    error: float
    worst: float
    where: str
    parameters: int


def rank_errors(spectra: Sequence[Spectrum], ranks: Iterable[int] | None = None) -> list[RankError]:
    """What each of some ranks would lose: by default powers of two, and the highest that there is."""
    if not spectra:
        return []
    highest = max(one.rank for one in spectra)
    asked = ranks if ranks is not None else [*(2**i for i in range(highest.bit_length()) if 2**i < highest), highest]
    tails = _tails(spectra)
    total = float(tails[:, 0].sum())
    sizes = torch.tensor([one.point.shape[0] + math.prod(one.point.shape[1:]) for one in spectra])
    limits = torch.tensor([one.rank for one in spectra])
    found: list[RankError] = []
    for rank in asked:
        lost = tails[:, min(rank, tails.shape[1] - 1)]
        relative = torch.where(tails[:, 0] > 0, lost / tails[:, 0].clamp_min(_TINY), lost)
        worst = int(relative.argmax())
        error = math.sqrt(float(lost.sum()) / total) if total else 0.0
        size = int((limits.clamp(max=rank) * sizes).sum())
        found.append(RankError(rank, error, math.sqrt(float(relative[worst])), spectra[worst].point.id, size))
    return found


_TINY = 1e-300


def _tails(spectra: Sequence[Spectrum]) -> Tensor:
    """[points, ranks + 1]: the sum of the squares of all singular values from a number on."""
    squares = torch.zeros(len(spectra), max(len(one.values) for one in spectra) + 1, dtype=torch.float64)
    for row, one in zip(squares, spectra, strict=True):
        row[: len(one.values)] = one.values.double().square()
    return squares.flip(1).cumsum(1).flip(1)


def recommended(spectra: Sequence[Spectrum], error: float = 0.1) -> tuple[int, dict[str, int]]:
    """The least rank for all points whose error is at most this, and the least for each point alone.

    Args:
        spectra: Of all points.
        error: Of the update's norm.
    """
    rule = RankRule(error=error)
    own = {one.point.id: rule.of(one.values, one.norm**2, one.point) or one.rank for one in spectra}
    highest = max((one.rank for one in spectra), default=1)
    rows = rank_errors(spectra, range(1, highest + 1))
    return next((row.rank for row in rows if row.error <= error), highest), own
