"""Losses on preferences, each as its paper has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """Of answers.

    Attributes:
        total: Their log-probabilities: [answers], float32.
        tokens: How many tokens each has.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability for each token of an answer."""
        return self.total / self.tokens


@dataclass(frozen=True)
class Outcome:
    """Of pairs, or of answers that are judged.

    Attributes:
        losses: One for each.
        margins: Above zero where the model agrees: by how much it prefers the better answer, or a good one to the
            reference, or a bad one less.
    """

    losses: Tensor
    margins: Tensor


class Constants(Protocol):
    """The options that losses have."""

    beta: float
    label_smoothing: float
    margin: float
    good_weight: float
    bad_weight: float


Pair = tuple[Likelihood, Likelihood]
"""Of the better answers, and of the others."""


def dpo(policy: Pair, reference: Pair, options: Constants) -> Outcome:
    """-log sigmoid(beta h), h the log-ratio of the pair above the reference's (Rafailov 2023, eq. 7).

    With `label_smoothing` a share of the labels is taken to be wrong (cDPO, Mitchell 2023).
    """
    h = (policy[0].total - policy[1].total) - (reference[0].total - reference[1].total)
    h, wrong = options.beta * h, options.label_smoothing
    return Outcome(-(1 - wrong) * F.logsigmoid(h) - wrong * F.logsigmoid(-h), h)


def ipo(policy: Pair, reference: Pair, options: Constants) -> Outcome:
    """(h - 1 / (2 beta))² (Azar 2023, eq. 17), h of the means over tokens, as its authors advise."""
    h = (policy[0].mean - policy[1].mean) - (reference[0].mean - reference[1].mean)
    return Outcome((h - 1 / (2 * options.beta)).square(), h)


def simpo(policy: Pair, reference: Pair | None, options: Constants) -> Outcome:
    """-log sigmoid(beta h - margin), h of the means over tokens, without a reference (Meng 2024, eq. 6)."""
    h = options.beta * (policy[0].mean - policy[1].mean)
    return Outcome(-F.logsigmoid(h - options.margin), h)


def orpo(policy: Pair, reference: Pair | None, options: Constants) -> Outcome:
    """The better answer's own loss, and beta times -log sigmoid of the log odds ratio (Hong 2024, eq. 6 and 7)."""
    h = _log_odds(policy[0].mean) - _log_odds(policy[1].mean)
    return Outcome(-policy[0].mean - options.beta * F.logsigmoid(h), h)


def _log_odds(logs: Tensor) -> Tensor:
    """log(p / (1 - p)) of a probability's logarithm."""
    return logs - torch.log(-torch.expm1(logs.clamp(max=-1e-6)))


def kto(policy: Likelihood, reference: Likelihood, drift: Tensor, good: Tensor, options: Constants) -> Outcome:
    """1 - sigmoid(beta (r - z)) of good answers, with the sign turned of bad ones, weighted (Ethayarajh 2024, eq. 8).

    Args:
        policy, reference: Of the answers; r is the difference of their totals.
        drift: z: the mean of r over answers to other prompts, at least 0, without a gradient; a scalar.
        good: [answers], boolean.
        options: `beta`, and the weights.
    """
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, options.good_weight, options.bad_weight)
    h = options.beta * sign * ((policy.total - reference.total) - drift)
    return Outcome(weight * (1 - torch.sigmoid(h)), h)


PAIRED: Mapping[str, Callable[[Pair, Pair, Constants], Outcome]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}
"""Of pairs, by name."""
WITHOUT_REFERENCE = frozenset({"simpo", "orpo"})
