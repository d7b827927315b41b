"""Figures of a classifier: as a whole and by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.training.classification.targets import loss_of


@dataclass(frozen=True)
class ClassFigures:
    """Of one class.

    Attributes:
        name: What it is called.
        images: How many were measured.
        precision: The share that is right of those that are said to be of it.
        recall: The share that is found of those that are.
        f1: The harmonic mean of both.
    """

    name: str
    images: int
    precision: float
    recall: float
    f1: float


def said(logits: Tensor, *, several: bool) -> Tensor:
    """The classes that are said, true or false: the likeliest, or each that is likelier than not."""
    if several:
        return logits > 0
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), True)


def overall(logits: Tensor, targets: Tensor, *, several: bool) -> dict[str, float]:
    """Accuracy, or where an image may be of several classes the mean average precision; mean F1 over classes; loss.

    Args:
        logits: [images, classes].
        targets: 0 or 1: [images, classes].
        several: Whether an image may be of several classes.
    """
    f1 = [one.f1 for one in by_class(logits, targets, range(targets.shape[1]), several=several) if one.images]
    mean_f1, loss = sum(f1) / max(len(f1), 1), loss_of(logits.double(), targets, None, several=several).item()
    if several:
        return {"mAP": mean_average_precision(logits, targets), "f1": mean_f1, "loss": loss}
    right = logits.argmax(-1) == targets.argmax(-1)
    return {"accuracy": right.double().mean().item(), "f1": mean_f1, "loss": loss}


def by_class(logits: Tensor, targets: Tensor, classes: Sequence[object], *, several: bool) -> list[ClassFigures]:
    """The figures of every class."""
    found, wanted = said(logits, several=several), targets > 0.5
    hits, claims, there = (part.sum(0).tolist() for part in (found & wanted, found, wanted))
    return [
        ClassFigures(
            str(name),
            there[n],
            hits[n] / claims[n] if claims[n] else 0.0,
            hits[n] / there[n] if there[n] else 0.0,
            2 * hits[n] / (claims[n] + there[n]) if claims[n] + there[n] else 0.0,
        )
        for n, name in enumerate(classes)
    ]


def mean_average_precision(logits: Tensor, targets: Tensor) -> float:
    """The mean over the classes that there are of the average precision."""
    each = [average_precision(logits[:, n], targets[:, n]) for n in range(targets.shape[1]) if targets[:, n].any()]
    return sum(each) / max(len(each), 1)


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """The sum over thresholds of the precision there times the recall that the threshold adds.

    Args:
        scores: [images]; those that are equal are above a threshold together.
        targets: 0 or 1, at least one of them 1: [images].
    """
    scores, order = scores.double().sort(descending=True)
    hits = targets[order].double().cumsum(0)
    ends = torch.cat([scores.diff() != 0, torch.ones(1, dtype=torch.bool)])
    precision = (hits / torch.arange(1, len(hits) + 1))[ends]
    recall = hits[ends] / hits[-1]
    return float((precision * recall.diff(prepend=torch.zeros(1, dtype=torch.double))).sum())


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images of class i are said to be of class j: [classes, classes]."""
    count = targets.shape[1]
    pairs = targets.argmax(-1) * count + logits.argmax(-1)
    return torch.bincount(pairs, minlength=count * count).view(count, count)
