"""How two adapters differ is how their dense updates do."""

from __future__ import annotations

import pytest
import torch
from adapterkit_lycoris.loha import LoHa

import adapterkit as ak
from adapterkit.tools.difference import difference
from adapterkit.tools.effects import effects
from adapterkit.tools.ranks import RankRule
from adapterkit.tools.resize import resize
from tests.tools import adapters

ONE = ak.LoRA(rank=2, alpha=3, targets="attn.q mlp.up")


def test_norms_and_angles_are_those_of_the_dense_updates():
    one = adapters.checkpoint(ak.Union((ONE, ak.Trainable("mlp.up", part="bias"))))
    other = adapters.checkpoint(LoHa(rank=2, targets="mlp.up"), seed=1)
    dense = [{e.point.id: (e.dense, e.bias) for e in effects(each)} for each in (one, other)]
    found = difference(one, other)
    assert found.only_one == ["attn.q@toy.0", "attn.q@toy.1"]
    assert found.only_other == []
    assert found.types == ("union", "loha")
    for point in found.points:
        flat = [
            torch.cat([weight.double().flatten(), torch.zeros(16) if bias is None else bias]).double()
            for weight, bias in (each[point.key] for each in dense)
        ]
        assert point.one == pytest.approx(float(flat[0].norm()), rel=1e-5)
        assert point.other == pytest.approx(float(flat[1].norm()), rel=1e-5)
        assert point.difference == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5)
        assert point.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
        assert not point.equal
    assert not found.equal


def test_an_adapter_is_equal_to_itself_and_to_no_other():
    one = adapters.checkpoint(ONE)
    found = difference(one, one.replace(config={**one.config, "targets": "attn.q mlp.*"}))
    assert found.equal
    assert found.relative == 0
    assert [point.cosine for point in found.points] == pytest.approx([1.0] * 4)
    tensors = {key: {**own, "A": own["A"].clone()} for key, own in one.tensors.items()}
    next(iter(tensors.values()))["A"][0, 0] += 1e-6
    found = difference(one, one.replace(tensors=tensors))
    assert not found.equal
    assert [point.equal for point in found.points] == [False, True, True, True]
    assert found.relative is not None
    assert 0 < found.relative < 1e-5


def test_the_same_effect_by_other_factors_is_near_and_not_equal():
    one = adapters.checkpoint(ONE)
    found = difference(one, resize(one, RankRule(rank=8)).checkpoint)
    assert not found.equal
    assert found.relative is not None
    assert found.relative < 1e-6


def test_configs_and_metadata_are_compared():
    one = adapters.checkpoint(ONE).replace(metadata={"trigger": "ink", "same": "x"})
    other = adapters.checkpoint(ak.LoRA(rank=3, targets="attn.q mlp.up")).replace(metadata={"same": "x"})
    found = difference(one, other)
    assert found.configs == {"lora.rank": (2, 3), "lora.alpha": (3, None)}
    assert found.metadata == {"trigger": ("ink", None)}


def test_what_changes_no_weight_is_compared_bit_for_bit():
    one = adapters.checkpoint(ak.DoRA(rank=2, targets="mlp.up"))
    found = difference(one, one)
    assert found.equal
    assert found.relative is None
    other = adapters.checkpoint(ak.DoRA(rank=2, targets="mlp.up"), seed=1)
    found = difference(one, other)
    assert not found.equal
    assert found.relative is None
