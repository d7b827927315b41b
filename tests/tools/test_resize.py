"""Other ranks: what is left out is the tail of the spectrum, and no more."""

from __future__ import annotations

import pytest
import torch
from adapterkit_lycoris.loha import LoHa
from adapterkit_lycoris.lokr import LoKr

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import BaseNeededError, ConfigError
from adapterkit.kernels import low_rank_algebra
from adapterkit.testing import models, toys
from adapterkit.tools.combine import Share, combine
from adapterkit.tools.effects import effects
from adapterkit.tools.points import points_of
from adapterkit.tools.ranks import RankRule, rank_errors, recommended
from adapterkit.tools.resize import resize, spectra
from tests.tools import adapters

LORA = ak.LoRA(rank=6, alpha=3, ranks={"mlp.*": 4}, targets="attn.q attn.v mlp.up")


def relative_error(one: Checkpoint, other: Checkpoint) -> float:
    whole, now = (adapters.changes(each, toys.ToyModel()) for each in (one, other))
    return adapters.norm(adapters.less(whole, now)) / adapters.norm(whole)


def test_the_error_that_is_told_is_the_one_that_is_made():
    checkpoint = adapters.checkpoint(LORA)
    found = resize(checkpoint, RankRule(rank=2))
    assert relative_error(checkpoint, found.checkpoint) == pytest.approx(found.error, rel=1e-4)
    for effect in effects(checkpoint):
        one = found.points[effect.point.id]
        values = torch.linalg.svdvals(effect.dense.double())
        assert one.error == pytest.approx(float(values[2:].norm()), rel=1e-4)
        assert one.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert (one.rank, one.before) == (2, 4 if "mlp" in effect.point.role else 6)
    assert not found.kept


def test_a_rank_that_is_there_loses_nothing():
    checkpoint = adapters.checkpoint(LORA)
    found = resize(checkpoint, RankRule(rank=64))
    assert found.error == 0
    assert relative_error(checkpoint, found.checkpoint) < 1e-6
    assert {one.rank for one in found.points.values()} == {4, 6}


@pytest.mark.parametrize(
    "rule", [RankRule(energy=0.8), RankRule(error=0.3), RankRule(ratio=3.0), RankRule(5, error=0.01)]
)
def test_each_rule_against_the_whole_spectrum(rule: RankRule):
    checkpoint = adapters.checkpoint(LORA)
    found = resize(checkpoint, rule)
    for effect in effects(checkpoint):
        values = torch.linalg.svdvals(effect.dense.double())
        rank = found.points[effect.point.id].rank
        shares = values.square().cumsum(0) / values.square().sum()
        if rule.ratio is not None:
            assert rank == int((values >= values[0] / rule.ratio).sum())
        elif rule.rank is not None:
            assert rank == min(5, 4 if "mlp" in effect.point.role else 6)
        else:
            share = rule.energy if rule.energy is not None else 1 - 0.3**2
            assert rank == int((shares < share).sum()) + 1


def test_an_adapter_of_no_effect_has_rank_one():
    checkpoint = adapters.checkpoint(LORA)
    zero = {key: {**own, "B": torch.zeros_like(own["B"])} for key, own in checkpoint.tensors.items()}
    for rule in (RankRule(energy=0.9), RankRule(ratio=2.0), RankRule(error=0.1)):
        found = resize(checkpoint.replace(tensors=zero), rule)
        assert {one.rank for one in found.points.values()} == {1}
        assert found.error == 0


def test_convolutions_have_a_rank_of_their_own():
    config = ak.LoRA(rank=6, targets="res.conv1 res.conv2 res.time")
    checkpoint = adapters.checkpoint(config, models.EXAMPLES[2].make())
    found = resize(checkpoint, RankRule(rank=3, conv_rank=2))
    assert {key.partition("@")[0]: one.rank for key, one in found.points.items()} == {
        "res.conv1": 2,
        "res.conv2": 2,
        "res.time": 3,
    }
    whole, now = (adapters.changes(each, models.EXAMPLES[2].make()) for each in (checkpoint, found.checkpoint))
    assert adapters.norm(adapters.less(whole, now)) / adapters.norm(whole) == pytest.approx(found.error, rel=1e-4)


def test_what_is_no_matrix_stays_as_it_is():
    config = ak.Union((ak.LoRA(rank=4, targets="mlp.up"), ak.Trainable("mlp.up", part="bias")))
    parts = [adapters.checkpoint(one).part for one in (config, ak.Bottleneck(width=2, targets="mlp"))]
    checkpoint = adapters.checkpoint(config).replace(parts=parts, metadata={"trigger": "ink"})
    found = resize(checkpoint, RankRule(rank=2))
    assert found.checkpoint.metadata == {"trigger": "ink"}
    assert found.kept == ("mlp@toy.0", "mlp@toy.1")
    loaded = ak.Adapters(toys.ToyModel())
    report = loaded.install("a", found.checkpoint)
    assert len(report.points) == 4
    for key in found.kept:
        for name, tensor in parts[1].tensors[key].items():
            assert torch.equal(loaded.modules("a")[key].state_dict()[name], tensor)
    shift = parts[0].tensors["mlp.up@toy.0"]["members.1.shift"]
    assert torch.equal(loaded.modules("a")["mlp.up@toy.0"].get_parameter("members.1.shift"), shift)


def test_a_norm_stays_as_it_is_where_the_base_is_there():
    parts = [adapters.checkpoint(one).part for one in (LORA, ak.Trainable("norm"))]
    checkpoint = adapters.checkpoint(LORA).replace(parts=parts)
    found = resize(checkpoint, RankRule(rank=2), points_of(toys.ToyModel()))
    assert found.kept == tuple(parts[1].tensors)
    assert relative_error(checkpoint, found.checkpoint) < found.error < 1


def test_what_is_dense_becomes_low_rank_with_its_error():
    checkpoint = adapters.checkpoint(LoKr(rank=2, factor=2, targets="mlp.up attn.q"))
    found = resize(checkpoint, RankRule(rank=3))
    assert [part.type for part in found.checkpoint.parts] == ["lora"]
    assert relative_error(checkpoint, found.checkpoint) == pytest.approx(found.error, rel=1e-4)
    best = resize(checkpoint, RankRule(error=1e-3))
    assert best.error <= 1e-3


def test_what_may_be_a_flattened_convolution_is_no_matrix_without_the_base():
    config = LoHa(rank=2, targets="res.conv1 res.time")
    checkpoint = adapters.checkpoint(config, models.EXAMPLES[2].make())
    with pytest.raises(BaseNeededError, match="whether it is a convolution"):
        resize(checkpoint, RankRule(rank=2))
    with pytest.raises(BaseNeededError, match="whether it is a convolution"):
        combine([Share(checkpoint)], rule=RankRule(rank=2))
    found = resize(checkpoint, RankRule(rank=2), points_of(models.EXAMPLES[2].make()))
    assert {key.partition("@")[0]: own["A"].shape for key, own in found.checkpoint.tensors.items()} == {
        "res.conv1": (2, 8, 3, 3),
        "res.time": (2, 8),
    }


def test_dora_becomes_low_rank_where_the_base_is_there():
    checkpoint = adapters.checkpoint(ak.DoRA(rank=2, targets="mlp.up"))
    found = resize(checkpoint, RankRule(error=0.2), points_of(toys.ToyModel()))
    assert found.error <= 0.2
    assert relative_error(checkpoint, found.checkpoint) == pytest.approx(found.error, rel=1e-4)


def test_the_dtype_is_what_is_asked_for():
    found = resize(adapters.checkpoint(LORA), RankRule(rank=2), dtype=torch.float16)
    assert {tensor.dtype for own in found.checkpoint.tensors.values() for tensor in own.values()} == {torch.float16}


def test_a_rank_is_recommended_with_what_each_would_lose():
    checkpoint = adapters.checkpoint(LORA)
    found = spectra(checkpoint)
    rows = rank_errors(found)
    assert [row.rank for row in rows] == [1, 2, 4, 6]
    for row in rows:
        resized = resize(checkpoint, RankRule(rank=row.rank))
        assert row.error == pytest.approx(resized.error, abs=1e-5)
        sizes = (tensor.numel() for own in resized.checkpoint.tensors.values() for tensor in own.values())
        assert row.parameters == sum(sizes)
        assert row.worst >= row.error
    best, own = recommended(found, 0.5)
    errors = {rank: resize(checkpoint, RankRule(rank=rank)).error for rank in range(1, 7)}
    assert best == min(rank for rank, error in errors.items() if error <= 0.5)
    assert own == {key: one.rank for key, one in resize(checkpoint, RankRule(error=0.5)).points.items()}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "give a rank"),
        ({"rank": 0}, "rank must be an int from 1, not 0"),
        ({"energy": 1.5}, "energy must be more than 0 and at most 1"),
        ({"ratio": 0.5}, "ratio must be at least 1"),
        ({"energy": 0.5, "error": 0.5}, "give one of energy, error and ratio, not energy and error"),
        ({"rank": 4, "conv_rank": True}, "conv_rank must be an int"),
        ({"error": float("nan")}, "error must be"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(values: dict[str, float], problem: str):
    with pytest.raises(ConfigError, match=problem):
        RankRule(**values)  # type: ignore[arg-type]


def test_the_spectrum_of_an_update_is_that_of_its_product():
    for one, effect in zip(spectra(adapters.checkpoint(LORA)), effects(adapters.checkpoint(LORA)), strict=True):
        assert isinstance(effect.weight, ak.Factors)
        expected = low_rank_algebra.decomposed(effect.weight).S
        torch.testing.assert_close(one.values[: len(expected)], expected.double(), atol=1e-6, rtol=1e-5)
