"""VB-LoRA: conformance, and PEFT's numbers from the same bank and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapterkit_peft_types.vblora import VBLoRA
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


class TestConformance(AdapterConformance):
    config = VBLoRA(rank=2, vectors=6, length=4, bank_bound=0.5)


@pytest.mark.slow
class TestChosen(AdapterConformance):
    config = VBLoRA(rank=2, vectors=6, length=4, bank_bound=0.5, chosen=True)


@pytest.mark.parametrize(("vectors", "length", "k"), [(8, 4, 2), (5, 2, 1), (6, 1, 3)])
def test_it_is_that_of_peft(same_as_peft: Callable[..., None], vectors: int, length: int, k: int) -> None:
    peft = pytest.importorskip("peft")

    def copied(module: ak.AdapterModule, layer: Any) -> None:
        module.shared.vectors.data.copy_(layer.vblora_vector_bank["default"].data)
        module.logits_A.data.copy_(layer.vblora_logits_A["default"].data)  # type: ignore[union-attr,operator]
        module.logits_B.data.copy_(layer.vblora_logits_B["default"].data)  # type: ignore[union-attr,operator]

    theirs = peft.VBLoRAConfig(
        r=3, num_vectors=vectors, vector_length=length, topk=k, target_modules=["first", "second"]
    )
    ours = VBLoRA(rank=3, vectors=vectors, length=length, k=k, targets="path:first path:second")
    same_as_peft(ours, theirs, copied)


def test_a_final_choice_is_that_of_the_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).double()
    adapters = ak.Adapters(model)
    adapters.add("a", VBLoRA(rank=2, vectors=5, length=2, k=3, targets="*"))
    adapters.add("b", VBLoRA(rank=2, vectors=5, length=2, k=3, chosen=True, targets="*"))
    [one], [other] = adapters.modules("a").values(), adapters.modules("b").values()
    other.shared.vectors.data.copy_(one.shared.vectors)
    for name in "AB":
        weights, indices = getattr(one, f"logits_{name}").detach().topk(3)
        other.get_buffer(f"indices_{name}").copy_(indices)
        other.get_buffer(f"weights_{name}").copy_(weights.softmax(-1)[..., :2])
    assert torch.allclose(one.delta_weight(), other.delta_weight(), rtol=1e-12, atol=1e-12)  # type: ignore[operator]
    assert [name for name, _ in other.named_parameters()] == ["shared.vectors"]


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"vectors": 0}, {"length": 0}, {"k": 0}, {"k": 300}, {"dropout": 1.0}, {"bank_bound": 0.0}]
)
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        VBLoRA(**options)


def test_a_length_must_divide_both_sides() -> None:
    with pytest.raises(errors.IncompatibleTargetError, match="length 4"):
        ak.Adapters(nn.Sequential(nn.Linear(12, 6))).add("a", VBLoRA(length=4, targets="*"))
