"""What an adapter adds to each weight, told without its model."""

from __future__ import annotations

import pytest
import torch
from adapterkit_ia3.ia3 import IA3
from adapterkit_lycoris.loha import LoHa
from adapterkit_lycoris.lokr import LoKr
from adapterkit_vera.vera import VeRA
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import BaseNeededError, NotMergeableError, ShapeMismatchError
from adapterkit.kernels.spans import write_spans
from adapterkit.points import Points
from adapterkit.testing import models, toys
from adapterkit.tools.describe import describe
from adapterkit.tools.effects import Effect, effects
from adapterkit.tools.modules import modules
from adapterkit.tools.points import points_of
from tests.tools import adapters

TYPES = {
    "linear": ak.LoRA(rank=3, alpha=5, targets="attn.q attn.v mlp.up"),
    "convolutions": ak.LoRA(rank=3, alphas={"res.conv2": 1.0}, targets="res.conv1 res.conv2 proj.in"),
    "ranks by role": ak.LoRA(rank=3, ranks={"mlp.*": 2}, targets="attn.q mlp.up"),
    "loha": LoHa(rank=2, alpha=3, targets="mlp.up"),
    "lokr": LoKr(rank=2, factor=2, targets="mlp.up"),
    "biases": ak.Trainable("mlp.up attn.q", part="bias"),
    "starts that are kept": ak.LoRA(rank=2, init="olora", targets="mlp.up"),
    "union": ak.Union((ak.LoRA(rank=2, targets="mlp.up"), ak.Trainable("mlp.up", part="bias"))),
}


def model_of(config: ak.AdapterConfig) -> nn.Module:
    return models.EXAMPLES[2].make() if "res" in config.targets else toys.ToyModel()


@pytest.mark.parametrize("name", TYPES)
def test_the_same_as_a_merge_adds_and_no_model_is_needed(name: str):
    config = TYPES[name]
    checkpoint = adapters.checkpoint(config, model_of(config))
    model = model_of(config)
    merged = adapters.changes(checkpoint, model)
    points = {point.id: point for point in points_of(model)}
    found: dict[str, Tensor] = {}
    for effect in effects(checkpoint):
        _put(found, points[effect.point.id], effect)
    assert found.keys() == merged.keys()
    for key, change in merged.items():
        torch.testing.assert_close(found[key], change, atol=1e-6, rtol=1e-5)


def _put(found: dict[str, Tensor], point: ak.InjectionPoint, effect: Effect) -> None:
    """What is added at a point, in the parameters of its module, which several points may share."""
    rows = 3 * point.out_features if point.span is not None else point.out_features
    pairs = [(point.layout.parameter, effect.dense), (point.layout.bias_parameter, effect.bias)]
    for name, change in pairs:
        if change is not None and change.any():
            whole = found.setdefault(f"{point.path}.{name}", torch.zeros(rows, *change.shape[1:], dtype=torch.float64))
            part = change.double()
            whole += part if point.span is None else write_spans(torch.zeros_like(whole), [(point.span, part)], 0)


WITH_BASE = (
    ak.DoRA(rank=2, targets="mlp.up"),
    ak.Trainable("mlp.up norm"),
    IA3(targets="mlp.up attn.q"),
)


@pytest.mark.parametrize("config", WITH_BASE)
def test_what_depends_on_the_weight_asks_for_the_model(config: ak.AdapterConfig):
    checkpoint = adapters.checkpoint(config)
    with pytest.raises(BaseNeededError, match=r"--base MODEL"):
        list(effects(checkpoint))
    model = toys.ToyModel()
    found = sum(effect.norm**2 for effect in effects(checkpoint, points_of(model))) ** 0.5
    assert found == pytest.approx(adapters.norm(adapters.changes(checkpoint, model)), rel=1e-6)


@pytest.mark.parametrize("config", [VeRA(rank=2, targets="mlp.up mlp.down"), ak.Invertible()])
def test_sizes_that_no_tensor_tells_are_not_guessed(config: ak.AdapterConfig):
    checkpoint = adapters.checkpoint(config)
    with pytest.raises((BaseNeededError, NotMergeableError)):
        list(effects(checkpoint))
    assert describe(checkpoint).norm == 0
    assert sum(describe(checkpoint).unknown.values()) == len(checkpoint.tensors) - ("shared" in checkpoint.tensors)


def test_shared_factors_are_known_with_the_base():
    checkpoint = adapters.checkpoint(VeRA(rank=2, targets="mlp.up mlp.down"))
    model = toys.ToyModel()
    found = sum(effect.norm**2 for effect in effects(checkpoint, points_of(model))) ** 0.5
    assert found == pytest.approx(adapters.norm(adapters.changes(checkpoint, model)), rel=1e-5)


def test_a_scale_that_only_the_models_layers_tell_asks_for_the_model():
    checkpoint = adapters.checkpoint(ak.LoRA(rank=2, alphas={"mlp.up@layer>=1": 8.0}, targets="mlp.up"))
    with pytest.raises(BaseNeededError, match="layer"):
        list(effects(checkpoint))
    low, high = effects(checkpoint, points_of(toys.ToyModel()))
    assert isinstance(low.weight, ak.Factors)
    assert isinstance(high.weight, ak.Factors)
    assert (low.weight.scale, high.weight.scale) == (1.0, 4.0)


def test_what_acts_on_no_weight_is_no_effect_on_one():
    with pytest.raises(NotMergeableError, match="acts on no weight"):
        list(effects(adapters.checkpoint(ak.Bottleneck(width=2, targets="mlp"))))


def test_tensors_that_cannot_be_the_types_are_refused():
    checkpoint = adapters.checkpoint(ak.LoRA(rank=2, targets="mlp.up"))
    [key, *_] = checkpoint.tensors
    wrong = {**checkpoint.tensors, key: {"A": torch.ones(2, 8), "B": torch.ones(16, 3)}}
    with pytest.raises(BaseNeededError):
        list(effects(checkpoint.replace(tensors=wrong)))
    with pytest.raises(ShapeMismatchError):
        list(effects(checkpoint.replace(tensors=wrong), points_of(toys.ToyModel())))


def test_a_rank_that_is_one_of_the_sizes_asked_with():
    point = next(point for point in Points(points_of(toys.ToyModel())) if point.role == "mlp.up")
    for rank in (1009, 53):
        checkpoint = adapters.checkpoint(ak.LoRA(rank=rank, targets="conv"))
        for placed in modules(checkpoint):
            assert placed.point is not None
            assert placed.point.shape == (8, 4, 3)
    assert point.shape == (16, 8)


def test_the_checkpoints_tensors_are_left_alone():
    checkpoint = adapters.checkpoint(TYPES["linear"])
    before = {(key, name): t.clone() for key, own in checkpoint.tensors.items() for name, t in own.items()}
    list(effects(checkpoint))
    for (key, name), tensor in before.items():
        now = checkpoint.tensors[key][name]
        assert torch.equal(now, tensor)
        assert not now.requires_grad
