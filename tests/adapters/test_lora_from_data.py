"""LoRA-GA and CorDA: starts from gradients, and from covariances with the weight; and how a type is shown gradients."""

from __future__ import annotations

import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.kernels.weights import weight_gradient
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()
TARGETS = "attn.{q,v} mlp.* conv"


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    return ak.Adapters(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    ids = toys.ids(seed=seed)
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "adapterkit" not in key}


# -- what a type is shown -------------------------------------------------------------------------------------------


class Witness(ak.AdditiveModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(point.out_features))
        self.point, self.total, self.calls = point, torch.zeros(()), 0

    def observe_gradient(self, x: Tensor, grad: Tensor) -> None:
        assert not torch.is_grad_enabled()
        layout: Any = self.point.layout
        self.total = self.total + weight_gradient(x, grad, self.point.shape, layout)
        self.calls += 1

    def delta(self, x: Tensor) -> Tensor:
        return self.shift.expand(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Witnesses(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = TARGETS
    observes_gradients = True

    def build(self, point: ak.InjectionPoint) -> Witness:
        return Witness(point)


def dense_gradients(model: toys.ToyModel, seeds: int = 1) -> dict[str, Tensor]:
    """The gradients of the base's own weights, of a sum of losses, by point id."""
    own = copy.deepcopy(model).requires_grad_(True)
    for seed in range(seeds):
        loss(own, seed).backward()
    found = {}
    for i, block in enumerate(own.blocks):
        rows: Any = block.attn.qkv.weight.grad.split(toys.WIDTH)  # type: ignore[union-attr]
        found |= {f"attn.q@toy.{i}": rows[0], f"attn.v@toy.{i}": rows[2], f"conv@toy.{i}": block.conv.weight.grad}  # type: ignore
        found |= {f"mlp.{name}@toy.{i}": getattr(block, name).weight.grad for name in ("up", "down")}
    return found


@pytest.mark.parametrize("frozen", [True, False])
def test_a_type_sees_the_gradient_of_its_points(model: toys.ToyModel, adapters: ak.Adapters, frozen: bool) -> None:
    expected = dense_gradients(model, 2)
    y = model(X)
    adapters.add("w", Witnesses())
    model.requires_grad_(not frozen)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with adapters.observing("w"):
        assert torch.equal(model(X), y)
        for seed in range(2):
            loss(model, seed).backward()
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    modules: dict[str, Any] = adapters.modules("w")  # type: ignore[assignment]
    assert modules.keys() == expected.keys()
    for key, module in modules.items():
        assert module.calls == 2, key
        assert close(module.total, expected[key]), key
        assert module.shift.grad is None or not module.shift.grad.any()


def test_without_a_backward_or_with_no_grad_nothing_is_seen(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("w", Witnesses())
    with adapters.observing("w"), torch.no_grad():
        assert not model(X).requires_grad
    assert all(module.calls == 0 for module in adapters.modules("w").values())


def test_checkpointed_blocks_are_counted_once(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = dense_gradients(model)
    adapters.add("w", Witnesses())
    for block in model.blocks:
        own = block.forward
        block.forward = lambda *args, own=own: torch.utils.checkpoint.checkpoint(own, *args, use_reentrant=False)  # type: ignore
    with adapters.observing("w"):
        loss(model).backward()
    assert all(close(module.total, expected[key]) for key, module in adapters.modules("w").items())  # type: ignore


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2)])
def test_the_gradient_of_a_convolution(groups: int, stride: int) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=1, groups=groups, padding_mode="reflect").double()
    adapters = ak.Adapters(nn.Sequential(layer))
    [point] = adapters.points()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    found = weight_gradient(x, 2 * y.detach(), point.shape, point.layout)  # type: ignore[arg-type]
    assert close(found, layer.weight.grad)  # type: ignore[arg-type]


# -- LoRA-GA --------------------------------------------------------------------------------------------------------


def test_lora_ga_starts_from_the_gradients_directions(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected, before, y = dense_gradients(model, 2), base_weights(model), model(X)
    adapters.add("a", ak.LoRA(rank=2, alpha=6, targets=TARGETS, init="lora_ga"))
    assert torch.equal(model(X), y)
    state = torch.get_rng_state()
    with adapters.observing("a"):
        for seed in range(2):
            loss(model, seed).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(X), y)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_weights(model).items())
    for key, grad in expected.items():
        module: Any = adapters.modules("a")[key]
        u, _, vh = torch.linalg.svd(grad.flatten(1), full_matrices=False)
        size = len(grad) ** 0.25 / 4.0
        for found, wanted in ((module.A.flatten(1), size * vh[:2]), (module.B.mT, size * u[:, 2:4].mT)):
            signs = (found * wanted).sum(1).sign()
            assert torch.allclose(found * signs[:, None], wanted, atol=1e-6), key  # up to sign
    randomize(adapters, "a")
    moved = model(X)
    with adapters.merged():
        assert close(model(X), moved)


def test_the_first_step_is_that_of_the_weight(adapters: ak.Adapters, model: toys.ToyModel) -> None:
    """With a full rank of directions, B0 dA + dB A0 is the projection of the gradient on A0's rows and B0's columns."""
    gradient = dense_gradients(model)["mlp.up@toy.0"]
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up@layer=0", init="lora_ga"))
    with adapters.observing("a"):
        loss(model).backward()
    loss(model).backward()
    [module] = adapters.modules("a").values()
    a, b, da, db = (tensor.detach() for tensor in (module.A, module.B, module.A.grad, module.B.grad))  # type: ignore
    step = b @ da + db @ a
    size = len(gradient) ** 0.5 / 16.0
    rows, columns = a.mT @ a / size, b @ b.mT / size
    assert close(step / size, columns @ gradient + gradient @ rows)


def test_dora_starts_so_too(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    y = model(X)
    adapters.add("d", ak.DoRA(rank=2, targets="mlp.up", init="lora_ga"))
    assert not any(module.B.any() for module in adapters.modules("d").values())  # type: ignore[union-attr,operator]
    with adapters.observing("d"):
        loss(model).backward()
    assert all(module.B.any() for module in adapters.modules("d").values())  # type: ignore[union-attr,operator]
    assert close(model(X), y)


def test_what_lora_ga_cannot_start_from(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=3, targets="mlp.down", init="lora_ga"))
    state = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    with pytest.raises(errors.ConfigError, match="no gradients: run backward"), adapters.observing("a"):
        model(X)
    with pytest.raises(errors.ConfigError, match="the gradient has 2 directions, and 2 x 3"), adapters.observing("a"):
        model(toys.ids(batch=1, length=2)).square().sum().backward()
    with pytest.raises(ZeroDivisionError), adapters.observing("a"):
        _raise(loss(model).backward())
    assert all(module._seen is None for module in adapters.modules("a").values())
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapters.state_dict("a").items())
    with pytest.raises(errors.IncompatibleTargetError, match="which has 8, and 10 is asked for"):
        adapters.add("b", ak.LoRA(rank=5, targets="mlp.up", init="lora_ga"))
    with pytest.raises(errors.IncompatibleTargetError, match="init='lora_ga' needs an input with features"):
        adapters.add("b", ak.LoRA(rank=2, targets="embed.tokens", init="lora_ga"))


def _raise(_: object) -> None:
    raise ZeroDivisionError


def test_a_union_shows_gradients_to_its_parts(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    parts = (ak.LoRA(rank=2, targets="mlp.up", init="lora_ga"), ak.LoRA(rank=2, targets="mlp.down", init="corda"))
    adapters.add("u", ak.Union(parts))
    with adapters.observing("u"):
        loss(model).backward()
    modules: dict[str, Any] = adapters.modules("u")  # type: ignore[assignment]
    assert all(module.members["0" if "up" in key else "1"].B.any() for key, module in modules.items())


# -- CorDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["corda", "corda_knowledge"])
def test_corda_is_its_equation(model: toys.ToyModel, adapters: ak.Adapters, init: str) -> None:
    inputs: list[Tensor] = []
    handle = model.blocks[0].up.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))  # type: ignore
    before, y = base_weights(model), model(X)
    inputs.clear()
    adapters.add("a", ak.LoRA(rank=3, alpha=6, targets="mlp.up conv", init=init))
    with adapters.observing("a"):
        model(X), model(toys.ids(seed=1))
    handle.remove()
    assert torch.equal(model(X), y)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_weights(model).items())
    c = sum((x / x.max().abs()).mT @ (x / x.max().abs()) for x in inputs) / 2
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    weight = before["blocks.0.up.weight"]
    u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
    part = slice(3) if init == "corda" else slice(-3, None)
    module: Any = adapters.modules("a")["mlp.up@toy.0"]
    assert close(2 * module.B @ module.A, u[:, part] * s[part] @ vh[part] @ c.inverse())
    assert close(module.B.norm(dim=0), (s[part] / 2).sqrt())
    randomize(adapters, "a")
    moved = model(X)
    with adapters.merged():
        assert close(model(X), moved)


def test_corda_of_inputs_that_are_zero(adapters: ak.Adapters) -> None:
    layer = nn.Linear(6, 5)
    alone = ak.Adapters(nn.Sequential(layer))
    alone.add("a", ak.LoRA(rank=2, targets="*", init="corda"))
    with alone.observing("a"):
        layer(torch.zeros(3, 6))
    [module] = alone.modules("a").values()
    assert torch.isfinite(module.A).all()  # type: ignore[arg-type]
    alone.add("b", ak.LoRA(rank=2, targets="*", init="corda"))
    with pytest.raises(errors.ConfigError, match="no inputs: run the model"), alone.observing("b"):
        pass


# -- files, and PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_it_is_saved_with_its_start(model: toys.ToyModel, adapters: ak.Adapters, init: str, tmp_path: Path) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets=TARGETS, init=init))
    with adapters.observing("a"):
        found = loss(model)
        assert found.requires_grad == (init == "lora_ga")
        if found.requires_grad:
            found.backward()
    randomize(adapters, "a")
    y = model(X)
    path = adapters.save("a", tmp_path / "a.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("a")
    assert torch.equal(model(X), y)


SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 11,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 2, 4, 6, 8, 10, 1, 3, 5]])


def llama() -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def pairs(adapters: ak.Adapters, theirs: nn.Module) -> list[tuple[Any, Any]]:
    """Our module and PEFT's layer at every point."""
    points = {point.id: point for point in adapters.points()}
    prefix = "base_model.model."
    return [(module, theirs.get_submodule(prefix + points[key].path)) for key, module in adapters.modules("a").items()]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("init", "method"), [("corda", "ipm"), ("corda_knowledge", "kpm")])
def test_corda_is_pefts(init: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    # PEFT takes a decorator from `attr`, which it does not require.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    corda = pytest.importorskip("peft.tuners.lora.corda")
    model = llama()
    run = [IDS, IDS.flip(1)]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )  # fmt: skip
    copied = copy.deepcopy(model)
    corda.preprocess_corda(copied, config, run_model=lambda: [copied(ids) for ids in run])
    theirs = peft.get_peft_model(copied, config)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=4, alpha=8, targets="attn.q mlp.down", init=init))
    with adapters.observing("a"):
        for ids in run:
            model(ids)
    for module, layer in pairs(adapters, theirs):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(module.B @ module.A, b @ a, rtol=1e-2, atol=1e-4)
        assert torch.allclose(module.A.norm(dim=1), a.norm(dim=1), rtol=1e-2)
        ours = layer.base_layer.weight + 2 * module.B @ module.A  # what PEFT took off its base, we keep as a start
        index = "q_proj" if module.at.startswith("attn") else "down_proj"
        assert index in [name.split(".")[-1] for name, one in theirs.named_modules() if one is layer]
        assert torch.allclose(ours, layer.base_layer.weight + 2 * b @ a, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_lora_ga_takes_pefts_directions() -> None:
    """PEFT scales B alone, by the singular values too, and the paper and its authors' code both factors, without."""
    peft = pytest.importorskip("peft")
    ga = pytest.importorskip("peft.tuners.lora.loraga")
    model = llama()
    config = peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(),
    )  # fmt: skip
    copied = copy.deepcopy(model)
    ga.preprocess_loraga(copied, config, lambda: copied(IDS, labels=IDS).loss.backward())
    theirs = peft.get_peft_model(copied, config)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=3, targets="attn.q mlp.down", init="lora_ga"))
    with adapters.observing("a"):
        model(IDS, labels=IDS).loss.backward()
    for module, layer in pairs(adapters, theirs):
        size = len(module.B) ** 0.25 / 4.0
        a, b = layer.lora_A["default"].weight, nn.functional.normalize(layer.lora_B["default"].weight, dim=0)
        for found, wanted in ((module.A / size, a), (module.B.mT / size, b.mT)):
            assert torch.allclose((found * wanted).sum(1).abs(), torch.ones(3), atol=1e-3)
