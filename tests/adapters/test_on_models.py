"""What only shows on a whole model: files, resuming, half precision, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapters.bottleneck import INPUTS
from adapterkit.errors import IncompatibleTargetError, TargetNotFoundError
from adapterkit.testing import toys


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def loaded(path: Path, config: ak.AdapterConfig, tmp: ak.Adapters) -> ak.Adapters:
    tmp.load(path, "again")
    assert tmp.config("again") == config
    tmp.activate("again")
    return tmp


def randomise(adapters: ak.Adapters, name: str = "a", std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def test_order_of_ranks_survives_a_file(tmp_path: Path) -> None:
    """The last match wins, so the order is part of the config, although two mappings are equal in any order."""
    model = toys.ToyModel()
    adapters = ak.Adapters(model)
    config = ak.LoRA(rank=2, targets="attn.* mlp.*", ranks={"mlp.*": 5, "mlp.down": 3, "attn.*": 4, "*@layer=1": 1})
    adapters.add("a", config)
    randomise(adapters)
    ranks = {key: module.A.shape[0] for key, module in adapters.modules("a").items()}  # type: ignore[union-attr]
    assert {ranks[f"{role}@toy.0"] for role in ("attn.q", "attn.o")} == {4}
    assert (ranks["mlp.up@toy.0"], ranks["mlp.down@toy.0"], ranks["mlp.down@toy.1"]) == (5, 3, 1)
    expected = model(toys.ids())
    path = adapters.save("a", tmp_path / "a.safetensors")
    other = toys.ToyModel()
    loaded(path, config, ak.Adapters(other))
    assert torch.equal(other(toys.ids()), expected)


STEPS = 4


@pytest.mark.parametrize(
    "config",
    [
        ak.Prefix(length=3, reparam=5),
        ak.Prefix(length=3),
        ak.LoRA(rank=2, ranks={"mlp.*": 1}, targets="attn.* mlp.*"),
        ak.Bottleneck(width=3, scaling="learned"),
    ],
    ids=["prefix-reparam", "prefix", "lora", "bottleneck"],
)
def test_training_resumes_from_the_file(config: ak.AdapterConfig, tmp_path: Path) -> None:
    """Saved half way and loaded into a fresh model, the losses are those of the uninterrupted run, bit for bit."""

    def train(adapters: ak.Adapters, model: nn.Module, name: str, steps: int) -> list[float]:
        adapters.activate(name)
        adapters.train(name)
        optimizer = torch.optim.SGD(adapters.parameters(name), lr=0.5)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(toys.ids()).flatten(0, 1), toys.ids(seed=2).flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, fresh = toys.ToyModel(), toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    first = train(adapters, model, "a", STEPS)
    path = adapters.save("a", tmp_path / "a.safetensors")
    second = train(adapters, model, "a", STEPS)
    assert second[-1] < first[0]
    again = loaded(path, config, ak.Adapters(fresh))
    assert train(again, fresh, "again", STEPS) == second


HALF: dict[str, Callable[[], ak.AdapterConfig]] = {
    "lora": lambda: ak.LoRA(rank=2, targets="embed.tokens attn.* mlp.* conv"),
    "bottleneck": lambda: ak.Bottleneck(targets="attn mlp", form="parallel_norm", scaling="learned"),
    "prefix": lambda: ak.Prefix(length=2, reparam=3),
}


@pytest.mark.parametrize("name", list(HALF))
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_half_precision_goes_through_in_half_precision(name: str, weight: float) -> None:
    """Every module of the model sees the dtype that it sees without the adapter, whose parameters are float32."""
    model = toys.ToyModel().bfloat16()
    plain = dtypes(model)
    adapters = ak.Adapters(model)
    adapters.add("a", HALF[name]())
    randomise(adapters)
    adapters.activate({"a": weight})
    assert dtypes(model) == plain
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}


def dtypes(model: nn.Module) -> list[tuple[str, torch.dtype]]:
    """What every module of the base gives, in the order of the calls."""
    seen: list[tuple[str, torch.dtype]] = []

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen.append((name, output.dtype))

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if "adapterkit" not in name
    ]
    model(toys.ids())
    for hook in hooks:
        hook.remove()
    assert len(seen) > len(hooks) // 2
    return seen


@pytest.mark.parametrize("form", list(INPUTS))
def test_bottleneck_forms_change_nothing_until_trained(form: str) -> None:
    model = toys.ToyModel()
    before = model(toys.ids())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(targets="attn mlp", form=form))
    assert torch.equal(model(toys.ids()), before)
    randomise(adapters)
    assert not torch.allclose(model(toys.ids()), before, atol=1e-4)


def test_types_refuse_each_others_points() -> None:
    adapters = ak.Adapters(toys.ToyModel())
    for config in (ak.LoRA(targets="mlp"), ak.Prefix(targets="attn.q"), ak.Bottleneck(targets="attn.kv")):
        with pytest.raises(IncompatibleTargetError):
            adapters.add("a", config)
    with pytest.raises(TargetNotFoundError):
        adapters.add("a", ak.LoRA(targets="attn.w"))
    assert len(adapters) == 0


def test_defaults_fit_a_model_as_they_are() -> None:
    for config in (ak.LoRA(), ak.Prefix(), ak.Bottleneck()):
        model = toys.ToyModel()
        ak.Adapters(model).add("a", config)
        output: Tensor = model(toys.ids())
        assert output.isfinite().all()
