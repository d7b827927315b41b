"""What a classifier should say, and the loss of what it says instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.classification.examples import Example


def targets_of(examples: Sequence[Example], classes: Sequence[str]) -> Tensor:
    """1 for the classes of each example: [examples, classes], float32."""
    number = {name: place for place, name in enumerate(classes)}
    found = torch.zeros(len(examples), len(classes))
    for row, example in enumerate(examples):
        for name in example.names:
            found[row, number[name]] = 1
    return found


class Targets:
    """The targets of examples by number, each made when it is asked for: all at once take classes times more memory.

    Args:
        examples: Pictures with their classes.
        classes: By number.
        smoothing: See `smoothed`.
    """

    def __init__(self, examples: Sequence[Example], classes: Sequence[str], smoothing: float = 0.0) -> None:
        self.examples, self.classes, self.smoothing = examples, classes, smoothing

    def __getitem__(self, number: int) -> Tensor:
        """[classes], float32."""
        return smoothed(targets_of([self.examples[number]], self.classes), self.smoothing)[0]


def smoothed(targets: Tensor, share: float) -> Tensor:
    """Targets of which a share is spread over all classes (Szegedy et al., 2016, arXiv:1512.00567)."""
    return targets * (1 - share) + share / targets.shape[-1]


def weights_of(
    told: Literal["balanced"] | Mapping[str, float] | None, counts: Mapping[str, int], classes: Sequence[str]
) -> Tensor | None:
    """What each class counts: [classes]; None where all count alike.

    `balanced` is n / (classes * count), the weight that gives every class the same part of the loss.

    Raises:
        ConfigError: A weight is of no class.
    """
    if told is None:
        return None
    if isinstance(told, Mapping):
        if strange := sorted(set(told) - set(classes)):
            raise ConfigError(
                [f"options.class_weights: {', '.join(strange)}: no such class; there are {', '.join(classes[:20])}"],
                "run",
            )
        return torch.tensor([told.get(name, 1.0) for name in classes])
    total = sum(counts.values())
    return torch.tensor([total / (len(classes) * max(counts.get(name, 0), 1)) for name in classes])


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor | None, *, several: bool) -> Tensor:
    """The mean loss, in float32 or more.

    Args:
        logits: [images, classes].
        targets: Between 0 and 1: [images, classes].
        weights: [classes].
        several: Whether each class is a question of its own (binary cross entropy), and not one of all (cross entropy,
            weighted as torch weights it: by the sum of the weights of the targets).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.to(logits.dtype)
    if several:
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)
    if weights is None:
        return F.cross_entropy(logits, targets)
    weighted = targets * weights
    return -(weighted * logits.log_softmax(-1)).sum() / weighted.sum().clamp(min=torch.finfo(logits.dtype).tiny)
