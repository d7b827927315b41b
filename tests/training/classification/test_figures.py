"""Figures and losses, against scikit-learn and the equations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn import metrics

from adapterkit.training.classification.figures import average_precision, by_class, confusion, overall
from adapterkit.training.classification.targets import loss_of, smoothed, weights_of

CLASSES = ["a", "b", "c", "d"]
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(40, 4, generator=GENERATOR).mul(4).round() / 4  # with ties
SEVERAL = torch.randint(2, (40, 4), generator=GENERATOR).float()
LABELS = torch.randint(4, (40,), generator=GENERATOR)
ONE = F.one_hot(LABELS, 4).float()


def test_figures_where_an_image_is_of_one_class():
    found, said = overall(LOGITS, ONE, several=False), LOGITS.argmax(-1)
    assert found["accuracy"] == metrics.accuracy_score(LABELS, said)
    assert abs(found["f1"] - metrics.f1_score(LABELS, said, average="macro")) < 1e-12
    assert abs(found["loss"] - F.cross_entropy(LOGITS.double(), LABELS).item()) < 1e-12
    assert confusion(LOGITS, ONE).tolist() == metrics.confusion_matrix(LABELS, said).tolist()
    expected: Any = metrics.precision_recall_fscore_support(LABELS, said)
    precision, recall, f1, support = expected
    for n, one in enumerate(by_class(LOGITS, ONE, CLASSES, several=False)):
        assert (one.name, one.images) == (CLASSES[n], support[n])
        assert abs(one.precision - precision[n]) + abs(one.recall - recall[n]) + abs(one.f1 - f1[n]) < 1e-12


def test_figures_where_an_image_is_of_several():
    found = overall(LOGITS, SEVERAL, several=True)
    assert abs(found["mAP"] - metrics.average_precision_score(SEVERAL, LOGITS, average="macro")) < 1e-12
    assert abs(found["f1"] - metrics.f1_score(SEVERAL, LOGITS > 0, average="macro")) < 1e-12
    assert abs(average_precision(torch.zeros(4), torch.tensor([1.0, 0, 0, 0])) - 0.25) < 1e-12


def test_losses_with_weights_are_those_of_torch():
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    ours = loss_of(LOGITS, ONE, weights, several=False)
    assert torch.allclose(ours, F.cross_entropy(LOGITS, LABELS, weight=weights))
    smooth = loss_of(LOGITS, smoothed(ONE, 0.1), None, several=False)
    assert torch.allclose(smooth, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))
    each = F.softplus(LOGITS) - LOGITS * SEVERAL
    assert torch.allclose(loss_of(LOGITS, SEVERAL, weights, several=True), (each * weights).mean())


def test_balanced_weights_give_classes_equal_parts():
    counts = {"a": 10, "b": 30, "c": 40, "d": 20}
    weights = weights_of("balanced", counts, CLASSES)
    assert weights is not None
    assert torch.allclose(weights * torch.tensor([10.0, 30, 40, 20]), torch.full((4,), 25.0))
    assert weights_of({"b": 2.0}, counts, CLASSES).tolist() == [1, 2, 1, 1]  # type: ignore[union-attr]
