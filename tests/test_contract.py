"""What a type may ask of the core: a module for all points, start values, inputs, rates, penalties, the weight."""

from __future__ import annotations

import ast
import copy
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.checkpoint import Checkpoint
from adapterkit.specs import AdapterSpec
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()


class Bank(nn.Module):
    def __init__(self, width: int, kept: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(width))
        self.register_buffer("fixed", torch.full((width,), 2.0), persistent=kept)


class SharedModule(ak.AdditiveModule):
    """Adds `own * shared.rows * shared.fixed` to every output."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))
        self.features = features

    def delta(self, x: Tensor) -> Tensor:
        row = self.own * self.shared.rows[: self.features] * self.shared.fixed[: self.features]
        return row.expand(*x.shape[:-1], self.features)


@dataclass(frozen=True)
class Shared(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.q mlp.*"
    kept: bool = True

    def build(self, point: ak.InjectionPoint) -> SharedModule:
        return SharedModule(point.out_features)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> nn.Module:
        return Bank(max(point.out_features for point in points), self.kept)


@ak.hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    return [AdapterSpec("bank", f"{__name__}:Shared", kinds={"weight"}, summary="for tests")]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    toys.register()
    manager = ak.get_plugin_manager()
    manager.register(sys.modules[__name__], name="contract")
    yield
    manager.unregister(name="contract")


@pytest.fixture
def model() -> toys.ToyModel:
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    return ak.Adapters(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


# -- a module for all points ----------------------------------------------------------------------------------------


def test_one_module_for_all_points(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    report = adapters.add("bank", Shared())
    modules = list(adapters.modules("bank").values())
    assert len({id(module.shared) for module in modules}) == 1
    width = 2 * toys.WIDTH
    assert report.parameters == len(modules) + width == sum(p.numel() for p in adapters.parameters("bank"))
    assert sum(ak.points(model, adapter=Shared()).costs.values()) == report.parameters
    own = [key for key in adapters.state_dict("bank") if key.startswith("shared/")]
    assert own == ["shared/rows", "shared/fixed"]
    assert len(adapters.state_dict("bank")) == len(modules) + 2


def test_what_is_shared_trains_as_one(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("bank", Shared())
    randomize(adapters, "bank")
    model(X).square().mean().backward()
    rows = next(iter(adapters.modules("bank").values())).shared.rows
    assert rows.grad is not None
    assert rows.grad.abs().min() > 0
    groups = adapters.parameter_groups("bank", lr=0.1)
    assert [len(group["params"]) for group in groups] == [len(list(adapters.parameters("bank")))]
    adapters.freeze("bank")
    assert not rows.requires_grad


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_shared_is_saved_once_and_loads(
    model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path, kept: bool
) -> None:
    adapters.add("bank", Shared(kept=kept), seed=3)
    randomize(adapters, "bank")
    y = model(X)
    path = adapters.save("bank", tmp_path / "bank.safetensors")
    assert path.stat().st_size < 8000
    adapters.detach()
    report = adapters.load(path)
    adapters.activate("bank")
    assert torch.equal(model(X), y)
    assert report.parameters == sum(p.numel() for p in adapters.parameters("bank"))
    assert len({id(module.shared) for module in adapters.modules("bank").values()}) == 1


def test_a_file_without_it_or_with_more_is_refused(adapters: ak.Adapters) -> None:
    adapters.add("bank", Shared())
    checkpoint = adapters.checkpoint("bank")
    adapters.detach()
    tensors = dict(checkpoint.tensors)
    shared = tensors.pop("shared")
    wrong: dict[type[errors.CheckpointError], Mapping[str, Tensor]] = {
        errors.MissingKeysError: {},
        errors.UnexpectedKeysError: {**shared, "more": torch.zeros(1)},
        errors.ShapeMismatchError: {**shared, "rows": torch.zeros(3, dtype=torch.float64)},
    }
    for error, state in wrong.items():
        broken = Checkpoint.of("bank", checkpoint.config, {**tensors, "shared": state})
        with pytest.raises(error, match="shared/"):
            adapters.install("bank", broken)
    lora = Checkpoint.of("lora", ak.LoRA(targets="attn.q").to_dict(), {"shared": shared})
    with pytest.raises(errors.CheckpointError):
        adapters.install("lora", lora)
    assert not len(adapters)


def test_what_is_shared_is_copied_pickled_and_moved_as_one(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("bank", Shared())
    randomize(adapters, "bank")
    y = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), y)
        modules = ak.Adapters(other).modules("bank").values()
        assert len({id(module.shared) for module in modules}) == 1
        other.float()
        assert next(iter(modules)).shared.rows.dtype == torch.float32
        assert torch.allclose(other(X).double(), y, rtol=1e-4, atol=1e-4)


def test_shared_is_seeded_and_leaves_the_points_alone(adapters: ak.Adapters) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapters.add(name, Shared(), seed=seed)
    rows = {name: adapters.state_dict(name)["shared/rows"] for name in adapters}
    assert torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], rows["c"])


# -- start values, inputs, rates, penalties, steps ------------------------------------------------------------------


class Curious(ak.AdditiveModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(point.shape))
        self.bias = nn.Parameter(torch.zeros(point.out_features))
        self.seen: list[Tensor] = []

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        self.start.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def observe(self, x: Tensor) -> None:
        self.seen.append(x)

    def penalty(self) -> Tensor:
        return self.start.square().sum()

    def delta(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


@dataclass(frozen=True)
class Curiosity(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.{q,v} mlp.up"

    def build(self, point: ak.InjectionPoint) -> Curious:
        return Curious(point)

    def rate(self, parameter: str, point: ak.InjectionPoint) -> float:
        return 16.0 if parameter == "bias" else 1.0

    def observed(self, modules: Mapping[str, ak.AdapterModule], base: Any) -> None:
        for module in modules.values():
            module.start.data.fill_(float(len(module.seen)))  # type: ignore[union-attr,arg-type,operator]

    def after_step(self, modules: Mapping[str, ak.AdapterModule], step: int, steps: int) -> None:
        for module in modules.values():
            module.start.data.fill_(step / steps)  # type: ignore[union-attr,operator]


def test_start_values_come_from_the_base(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("curious", Curiosity())
    block, width = model.blocks[1], toys.WIDTH
    qkv, state = block.attn.qkv, adapters.state_dict("curious")  # type: ignore[union-attr]
    assert torch.equal(state["attn.v@toy.1/start"], qkv.weight[2 * width :])  # type: ignore[index]
    assert torch.equal(state["attn.q@toy.1/bias"], qkv.bias[:width])  # type: ignore[index]
    assert torch.equal(state["mlp.up@toy.1/start"], block.up.weight)  # type: ignore[arg-type,union-attr]
    adapters.state_dict("curious")["mlp.up@toy.1/start"].zero_()
    assert block.up.weight.abs().sum() > 0  # type: ignore[union-attr,operator]


def test_start_values_are_skipped_on_meta() -> None:
    with torch.device("meta"):
        model = toys.ToyModel()
    ak.Adapters(model).add("curious", Curiosity())


def test_inputs_are_observed_without_an_effect(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("curious", Curiosity())
    adapters.add("lora", ak.LoRA(targets="mlp.up"))
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    given: list[Tensor] = []
    handle = model.blocks[0].up.register_forward_pre_hook(lambda module, args: given.append(args[0]))  # type: ignore
    adapters.activate(["curious", "lora"])
    with adapters.observing("curious"):
        assert adapters.active == {"lora": 1.0}
        model(X), model(X)
    handle.remove()
    seen = adapters.modules("curious")["mlp.up@toy.0"].seen
    assert len(seen) == 2  # type: ignore[arg-type]
    assert torch.equal(seen[1], given[1])  # type: ignore[index]
    assert not seen[0].requires_grad  # type: ignore[index]
    assert float(adapters.state_dict("curious")["mlp.up@toy.0/start"].max()) == 2.0
    assert adapters.active == {"curious": 1.0, "lora": 1.0}
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_what_has_no_input_cannot_observe(adapters: ak.Adapters) -> None:
    adapters.add("kv", ak.Prefix())
    with pytest.raises(errors.IncompatibleTargetError, match=r"attn\.kv@toy\.0"), adapters.observing("kv"):
        pass
    with pytest.raises(errors.UnknownNameError), adapters.observing("nope"):
        pass


def test_rates_penalties_and_steps(adapters: ak.Adapters) -> None:
    adapters.add("curious", Curiosity())
    groups = {group["lr"]: group["params"] for group in adapters.parameter_groups(lr=0.5)}
    assert {lr: len(params) for lr, params in groups.items()} == {0.5: 6, 8.0: 6}
    starts = [t for key, t in adapters.state_dict("curious").items() if key.endswith("start")]
    assert close(torch.as_tensor(adapters.penalty()), sum(t.square().sum() for t in starts))  # type: ignore[arg-type]
    adapters.after_step(1, 4)
    assert all(bool((t == 0.25).all()) for t in starts)
    adapters.freeze()
    assert adapters.penalty() == 0.0
    assert adapters.parameter_groups(lr=1.0) == []
    adapters.after_step(2, 4)
    assert all(bool((t == 0.25).all()) for t in starts)


# -- the base's weight ----------------------------------------------------------------------------------------------


class Reader(ak.AdapterModule):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.got: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.got.append((base.weight, base.bias))
        return base(x)


@dataclass(frozen=True)
class Reading(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "attn.v mlp.down conv"

    def build(self, point: ak.InjectionPoint) -> Reader:
        return Reader()


def test_a_type_reads_the_weight_of_its_point(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("reader", Reading())
    adapters.add("lora", ak.LoRA(rank=2, targets="mlp.down"))
    randomize(adapters, "lora")
    adapters.activate(["reader"])
    model(X)
    got = {key: module.got[-1] for key, module in adapters.modules("reader").items()}  # type: ignore[union-attr,index]
    block = model.blocks[0]
    qkv, width = block.attn.qkv, toys.WIDTH  # type: ignore[union-attr]
    assert torch.equal(got["attn.v@toy.0"][0], qkv.weight[2 * width :])  # type: ignore[index]
    assert torch.equal(got["attn.v@toy.0"][1], qkv.bias[2 * width :])  # type: ignore[index,arg-type]
    assert torch.equal(got["conv@toy.0"][0], block.conv.weight)  # type: ignore[union-attr,arg-type]
    assert got["mlp.down@toy.0"][1] is None
    assert not got["mlp.down@toy.0"][0].requires_grad
    adapters.activate(ak.Stack("lora", "reader"))
    model(X)
    lora = adapters.modules("lora")["mlp.down@toy.0"]
    expected, _ = lora.merged(block.down.weight, None)  # type: ignore[union-attr,arg-type]
    below = adapters.modules("reader")["mlp.down@toy.0"].got[-1][0]  # type: ignore[union-attr,index]
    assert close(below, expected)


# -- choosing and narrowing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Biased(Reading):
    targets: str = "mlp.*"

    def narrow(self, points: Sequence[ak.InjectionPoint]) -> list[ak.InjectionPoint]:
        return [point for point in points if point.layout.bias]  # type: ignore[union-attr]


def test_points_that_do_not_concern_a_type_are_left_out(adapters: ak.Adapters) -> None:
    assert set(adapters.add("biased", Biased()).points) == {"mlp.up"}
    with pytest.raises(errors.IncompatibleTargetError, match=r"none of the 2 points that 'mlp\.down' names"):
        adapters.add("none", Biased(targets="mlp.down"))


def test_the_whole_tree_of_errors_is_at_the_top() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(ak.__all__)
    assert all(getattr(ak, name) is getattr(errors, name) for name in tree)
    with pytest.raises(ak.AdapterKitError):
        raise ak.DataError("no such folder")


def test_no_error_of_ours_lives_elsewhere() -> None:
    for path in Path(ak.__file__).parent.rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
        bases = {base.id for one in classes for base in one.bases if isinstance(base, ast.Name)}
        assert path.name == "errors.py" or not {n for n in ak.__all__ if n.endswith("Error")} & bases, path
