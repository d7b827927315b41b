"""What an adapter is, point by point and as a whole: ranks, scales, norms, spectra, and what its file tells."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.factors import Factors
from adapterkit.errors import BaseNeededError, NotMergeableError
from adapterkit.points import Points
from adapterkit.tools.effects import effect_of
from adapterkit.tools.modules import Placed, modules
from adapterkit.tools.ranks import Spectrum

_TRIGGERS = ("modelspec.trigger_phrase", "trigger", "trigger_words", "trained_words")
_TAGS = "ss_tag_frequency"
_MOST_TAGS = 8
_DENSE_SPECTRUM = 1 << 20
"""Numbers of a dense update up to which its singular values are computed."""


@dataclass(frozen=True)
class PointFacts:
    """What an adapter is at one point.

    Attributes:
        key: The point's id.
        shape: Of the weight, where it is known.
        rank, scale: Of a low-rank update.
        alpha: What the file says.
        norm: Of what is added to weight and bias; None where `unknown` says why that is not known.
        spectrum: The singular values of what is added to the weight, where they were computed.
    """

    key: str
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    scale: float | None = None
    alpha: float | None = None
    norm: float | None = None
    spectrum: Spectrum | None = None
    unknown: str = ""


@dataclass(frozen=True)
class Facts:
    """What an adapter is.

    Attributes:
        points: Point by point.
    """

    points: Sequence[PointFacts]

    @property
    def ranks(self) -> Mapping[int, int]:
        """Rank -> how many points have it."""
        return _counts(point.rank for point in self.points)

    @property
    def scales(self) -> Mapping[float, int]:
        """Scale -> how many points have it."""
        return _counts(point.scale for point in self.points)

    @property
    def alphas(self) -> Mapping[float, int]:
        """Alpha -> how many points have it."""
        return _counts(point.alpha for point in self.points)

    @property
    def norm(self) -> float:
        """Of the whole effect on weights, as far as it is known."""
        return math.hypot(*(point.norm for point in self.points if point.norm is not None))

    @property
    def norms(self) -> Mapping[str, float]:
        """Point id -> norm of what is added there."""
        return {point.key: point.norm for point in self.points if point.norm is not None}

    @property
    def spectra(self) -> list[Spectrum]:
        """Those that are known."""
        return [point.spectrum for point in self.points if point.spectrum is not None]

    @property
    def unknown(self) -> Mapping[str, int]:
        """Why something is not known -> at how many points."""
        return _counts(point.unknown or None for point in self.points)


def _counts(values: Any) -> dict[Any, int]:
    return dict(sorted(collections.Counter(value for value in values if value is not None).items()))


def describe(checkpoint: Checkpoint, points: Points | None = None, source: object = None) -> Facts:
    """Looks at an adapter; what cannot be known without its model is said to be unknown.

    Args:
        checkpoint: The adapter.
        points: The model's, where it is at hand; see `effects`.
        source: Named in errors.

    Raises:
        CheckpointError: Its tensors are not those that its type asks for.
    """
    return Facts([_facts(placed, points, source) for placed in modules(checkpoint, points, source)])


def _facts(placed: Placed, points: Points | None, source: object) -> PointFacts:
    alpha = getattr(placed.config.at(placed.key), "alpha", None)
    try:
        effect = effect_of(placed, points, source)
    except (NotMergeableError, BaseNeededError) as error:
        told = "it changes no weight" if isinstance(error, NotMergeableError) else "the base alone can tell"
        shape = None if placed.point is None else placed.point.shape
        return PointFacts(placed.key, shape, alpha=alpha, unknown=told)
    low, point = effect.weight if isinstance(effect.weight, Factors) else None, effect.point
    spectrum = None
    if len(point.shape) > 1 and (low is not None or 0 < math.prod(point.shape) <= _DENSE_SPECTRUM):
        spectrum = Spectrum(point, effect.singular_values, effect.rank)
    norm = effect.norm if spectrum is None or effect.bias is not None else spectrum.norm
    rank, scale = (None, None) if low is None else (low.rank, low.scale)
    return PointFacts(placed.key, point.shape, rank, scale, alpha, norm, spectrum)


def energy_ranks(spectra: Sequence[Spectrum], shares: Sequence[float] = (0.5, 0.9, 0.99)) -> dict[float, list[int]]:
    """Part of the energy (the sum of squared singular values) -> for each point the rank that holds it."""
    return {share: [_rank_for(one.values, share) for one in spectra] for share in shares}


def _rank_for(values: Tensor, share: float) -> int:
    squares = values.double().square()
    total = float(squares.sum())
    return int((squares.cumsum(0) < share * (1 - 1e-12) * total).sum()) + 1 if total else 0


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that call for what was learnt: those that are said, or the tags that training saw most."""
    told = next((metadata[name] for name in _TRIGGERS if metadata.get(name)), "")
    if told:
        return [word.strip() for word in told.split(",") if word.strip()]
    try:
        folders: Any = json.loads(metadata.get(_TAGS, "{}"))
        counts: collections.Counter[str] = collections.Counter()
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):  # anybody's text
        return []
    return [tag for tag, _ in counts.most_common(_MOST_TAGS)]
