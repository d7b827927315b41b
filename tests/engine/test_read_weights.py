"""Weights that a model reads, stacks of experts, and projections of several inputs: against dense formulas."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.backend import Backend
from adapterkit.engine.read_weights import StackedWeight
from adapterkit.mapping.family import Experts, FusedInput, Group, Read, resolve
from adapterkit.points import InjectionPoint, Span
from adapterkit.specs import BackendSpec

D, H, E = 6, 4, 3


class Reader(nn.Module):
    """Reads a linear's weight, as SwinV2 does, and has two parts in its output projection, as Flux has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, D)
        self.out = nn.Linear(D + H, D)
        self.router = nn.Linear(D, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.qkv.weight, self.qkv.bias)
        return self.out(torch.cat([torch.tanh(y), self.router(x)], dim=-1))


class Stack(nn.Module):
    """[experts, out, in] with gate and up one after the other, indexed by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, 2 * H, D))
        self.down = nn.Parameter(torch.randn(E, D, H))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in torch.arange(2):  # the last expert is never used
            gate, up = F.linear(x, self.up[expert]).chunk(2, dim=-1)
            out = out + F.linear(F.silu(gate) * up, self.down[expert])
        return out


class Interleaved(nn.Module):
    """[experts, in, out] with gate and up interleaved, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(E, D, 2 * H)), nn.Parameter(torch.randn(E, 2 * H))
        self.down, self.down_bias = nn.Parameter(torch.randn(E, H, D)), nn.Parameter(torch.randn(E, D))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(E):
            both = x @ self.up[expert] + self.up_bias[expert]
            hidden = F.silu(both[..., ::2]) * both[..., 1::2]
            out = out + hidden @ self.down[expert] + self.down_bias[expert]
        return out


class Batched(nn.Module):
    """[experts, in, out], all of them in one batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, D, 2 * H)), nn.Parameter(torch.randn(E, H, D))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).expand(E, -1, -1)
        gate, up = torch.bmm(rows, self.up).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down).sum(0).view_as(x)


class ReadModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def interleaved(block: nn.Module, rows: int) -> list[Span]:
    return [Span(i, 1, count=rows // 2, step=2) for i in range(2)]


TABLES = {
    Reader: (
        Read("attn.q", "qkv"),
        FusedInput(("attn.o", "mlp.down"), "out", lambda block, columns: [Span(0, D), Span(D, H)]),
    ),
    Stack: (Experts(("moe.gate", "moe.up"), "", "up"), Experts(("moe.down",), "", "down")),
    Interleaved: (
        Experts(("moe.gate", "moe.up"), "", "up", "up_bias", "linear_t", interleaved),
        Experts(("moe.down",), "", "down", "down_bias", "linear_t"),
    ),
    Batched: (
        Experts(("moe.gate", "moe.up"), "", "up", "", "linear_t"),
        Experts(("moe.down",), "", "down", "", "linear_t"),
    ),
}


class ReadBackend(Backend):
    component = "toy"

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        table = next(entries for cls, entries in TABLES.items() if isinstance(model.inner, cls))
        return resolve(model, [Group("inner", "", table)], component)


@ak.hookimpl
def adapterkit_register_backends() -> Iterable[BackendSpec]:
    root = __name__.partition(".")[0]
    return [BackendSpec("read_toy", f"{__name__}:ReadBackend", models=(f"{root}:ReadModel",))]


def register() -> None:
    manager = ak.get_plugin_manager()
    if "read_toy" not in manager.backends():
        manager.register(sys.modules[__name__], name="read_toys")


@pytest.fixture(params=TABLES, ids=lambda cls: cls.__name__)
def model(request: pytest.FixtureRequest) -> ReadModel:
    register()
    return ReadModel(request.param()).double().eval()


def x() -> Tensor:
    return torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def randomize(adapters: ak.Adapters, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_(0, 0.5, generator=generator)


def dense(model: ReadModel, adapters: ak.Adapters, name: str, scale: float = 1.0) -> ReadModel:
    """A copy without adapters, with the updates written into its weights row by row."""
    plain = copy.deepcopy(model)
    ak.Adapters(plain).detach()
    for point in adapters.points():
        if point.id not in adapters.modules(name):
            continue
        weight = plain.get_submodule(point.path)._parameters[point.layout.parameter].data  # type: ignore[union-attr]
        weight = weight if point.layout.index is None else weight[point.layout.index]  # type: ignore[union-attr]
        weight = weight.T if point.layout.form == "linear_t" else weight  # type: ignore[union-attr]
        module = adapters.modules(name)[point.id]
        update = scale * (module.B @ module.A).detach()  # type: ignore[operator]
        span = point.span or Span(0, weight.shape[0])
        rows = [g * (span.step or 0) + span.start + i for g in range(span.count) for i in range(span.size)]
        start = point.in_span.start if point.in_span else 0
        for row, values in zip(rows, update, strict=True):
            weight[row, start : start + len(values)] += values
    return plain


@pytest.mark.parametrize("targets", ["*", "moe.up attn.q", "moe.gate@expert=1 attn.o", "moe.down mlp.down"])
def test_equals_the_dense_update(model: ReadModel, targets: str) -> None:
    roles = {point.role for point in ak.points(model)}
    targets = " ".join(t for t in targets.split() if t == "*" or t.partition("@")[0] in roles)
    base = model(x())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets=targets))
    assert torch.equal(model(x()), base)
    randomize(adapters, "a")
    y = model(x())
    assert not torch.allclose(y, base)
    assert torch.allclose(y, dense(model, adapters, "a")(x()), rtol=1e-10, atol=1e-10)
    adapters.activate({"a": -0.5})
    assert torch.allclose(model(x()), dense(model, adapters, "a", -0.5)(x()), rtol=1e-10, atol=1e-10)
    adapters.activate("a")
    with adapters.merged():
        assert torch.allclose(model(x()), y, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(x()), y)
    adapters.detach()
    assert torch.equal(model(x()), base)


class Rescaled(ak.AdapterModule):
    """An equivalent weight and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.factor, bias


@dataclass(frozen=True)
class Rescale(ak.AdapterConfig):
    kinds: ClassVar = frozenset({"weight"})
    targets: str = "moe.down"

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        return Rescaled()


def test_what_has_a_weight_alone_acts_in_a_batched_product() -> None:
    register()
    model = ReadModel(Batched()).double().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", Rescale())
    y = model(x())
    with adapters.merged():
        assert torch.allclose(model(x()), y, rtol=1e-10, atol=1e-10)


class Shifted(Rescaled):
    """Another bias too, also where there was none."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.factor, weight.new_ones(len(weight)) if bias is None else bias + self.factor


@dataclass(frozen=True)
class Shift(Rescale):
    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        return Shifted()


def test_a_stack_of_biases_is_read_with_the_adapters_of_each() -> None:
    register()
    model = ReadModel(Interleaved()).double().eval()
    inner, before = model.inner, copy.deepcopy(model.inner)
    adapters = ak.Adapters(model)
    adapters.add("a", Shift(targets="moe.down@expert=1 moe.gate@expert=2"))
    assert torch.equal(inner.down_bias[1], before.down_bias[1] + 0.5)
    assert torch.equal(inner.down_bias[0], before.down_bias[0])
    assert torch.equal(inner.up_bias[2][::2], before.up_bias[2][::2] + 0.5)
    assert torch.equal(inner.up_bias[2][1::2], before.up_bias[2][1::2])
    y = model(x())
    with adapters.merged():
        assert torch.allclose(model(x()), y, rtol=1e-10, atol=1e-10)
    adapters.add("b", Rescale())
    adapters.activate("b")
    assert torch.equal(inner.down_bias[1], before.down_bias[1])
    assert torch.equal(inner.down[1], before.down[1] * 0.5)


@pytest.mark.parametrize("targets", ["moe.down@expert=1", "moe.gate@expert=1"])
def test_a_stack_without_biases_is_read_with_none(targets: str) -> None:
    register()
    model = ReadModel(Stack()).double().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", Shift(targets=targets))
    with pytest.raises(errors.IncompatibleTargetError, match="adds a bias, and the model reads a weight there but no"):
        model(x())


def test_every_used_parameter_gets_its_gradient(model: ReadModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    randomize(adapters, "a")
    model(x()).square().sum().backward()
    for key, module in adapters.modules("a").items():
        unused = isinstance(model.inner, Stack) and key.endswith("toy.2")
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) is not unused, key


def test_sums_copies_and_pickles(model: ReadModel) -> None:
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ak.LoRA(rank=1, targets="*"))
        randomize(adapters, name, i)
    adapters.activate({"a": 0.3, "b": -2.0})
    y = model(x())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x()), y)
        with ak.Adapters(twin).merged():
            assert torch.allclose(twin(x()), y, rtol=1e-10, atol=1e-10)


def test_only_the_experts_that_are_used_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = StackedWeight._one

    def recording(self: StackedWeight, index: int) -> Tensor:
        made.append(index)
        return real(self, index)

    monkeypatch.setattr(StackedWeight, "_one", recording)
    register()
    for inner, expected in ((Stack(), {0, 1}), (Batched(), set())):
        made.clear()
        model = ReadModel(inner).double()
        adapters = ak.Adapters(model)
        adapters.add("a", ak.LoRA(rank=1, targets="*"))
        model(x())
        assert set(made) == expected


def test_a_stack_is_read_like_its_parameter(model: ReadModel) -> None:
    if isinstance(model.inner, Reader):
        pytest.skip("no stack")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="moe.up"))
    randomize(adapters, "a")
    stack = model.inner.up
    assert isinstance(stack, StackedWeight)
    whole = torch.stack([stack[i] for i in range(len(stack))])
    assert torch.equal(stack.whole(), whole)
    assert torch.equal(torch.sum(stack), whole.sum())  # type: ignore[call-overload]
    assert torch.equal(stack.transpose(1, 2), whole.transpose(1, 2))  # pyright: ignore[reportCallIssue]
    assert torch.equal(stack[-1], whole[-1])
    assert (stack.shape, stack.dtype, stack.device) == (whole.shape, whole.dtype, whole.device)
    with adapters.disabled():
        assert isinstance(model.inner.up, nn.Parameter)
    adapters.merge()
    assert isinstance(model.inner.up, nn.Parameter)


@dataclass(frozen=True)
class Weightless(ak.AdapterConfig):
    """Builds a module that acts by its forward alone."""

    kinds: ClassVar = frozenset({"weight"})
    additive: bool = False

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        return ak.AdditiveModule() if self.additive else ak.AdapterModule()


@pytest.mark.parametrize("additive", [False, True])
def test_a_type_without_a_weight_is_refused_where_the_weight_is_read(model: ReadModel, additive: bool) -> None:
    config, first = Weightless(targets="*", additive=additive), "attn.q" if isinstance(model.inner, Reader) else "moe."
    told = rf"Weightless cannot act at {first}.*reads the weight there.*has no equivalent weight"
    before = dict(model.named_modules())
    with pytest.raises(errors.IncompatibleTargetError, match=told):
        ak.Adapters(model).add("a", config)
    with pytest.raises(errors.IncompatibleTargetError, match=told):
        ak.points(model, adapter=config)
    assert dict(model.named_modules()) == before
    if isinstance(model.inner, Reader):  # its output projection is called
        ak.Adapters(model).add("a", Weightless(targets="attn.o mlp.down"))


def test_a_file_of_such_a_type_does_not_fit_the_base(model: ReadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="attn.q" if isinstance(model.inner, Reader) else "moe.gate"))
    checkpoint, module = adapters.checkpoint("a"), next(iter(adapters.modules("a").values()))
    adapters.remove("a")
    monkeypatch.setattr(type(module), "abilities", replace(module.abilities, merge=False))
    with pytest.raises(errors.BaseMismatchError, match=r"LoRA cannot act at .*reads the weight there"):
        adapters.install("a", checkpoint)
    assert list(adapters) == []


def test_what_has_no_weight_cannot_act_where_the_weight_is_read(model: ReadModel) -> None:
    if isinstance(model.inner, Reader):
        with pytest.raises(errors.IncompatibleTargetError, match="output"):
            ak.Adapters(model).add("a", ak.Bottleneck(targets="attn"))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_that_was_normed_later_is_read_while_nothing_acts() -> None:
    register()
    model = ReadModel(Reader()).double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q"))
    expected = model(x())
    adapters.activate(None)
    nn.utils.weight_norm(model.inner.qkv)
    assert torch.allclose(model(x()), expected)
    model.inner.qkv.bias = None
    assert model.inner.qkv.bias is None
