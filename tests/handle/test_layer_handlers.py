"""A storage of weights that a plug-in teaches: int8 with a scale for each row, in layers of two libraries' sorts."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.contract.layer import LayerHandler
from adapterkit.kernels.weights import base_weight, stored_weight
from adapterkit.points import WeightLayout
from adapterkit.specs import LayerSpec
from tests.values import randomize

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class Int8Linear(nn.Linear):
    """Int8 weights as a buffer of the weight's name, as bitsandbytes has them: a Linear by its class alone."""

    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        weight, scale = quantized(self.weight)
        del self.weight
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class PackedLinear(nn.Module):
    """A layer of no class of torch's, as HQQ's: nobody but its handler knows that it is one."""

    packed: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        packed, scale = quantized(torch.randn(outputs, inputs))
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed * self.scale).T


class Coded(Tensor):
    """A tensor that stands for another, as torchao's: the layer around it is torch's own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = Int8Linear(5, 8), PackedLinear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Int8(LayerHandler):
    """Knows both."""

    def layout(self, module: nn.Module) -> tuple[WeightLayout, int, int] | None:
        if not isinstance(module, PackedLinear):
            return None
        rows, columns = module.packed.shape
        return WeightLayout("linear"), int(columns), int(rows)

    def weight(self, module: Any, layout: WeightLayout) -> Tensor:
        return (module.packed if isinstance(module, PackedLinear) else module.weight) * module.scale


ROOT = __name__.partition(".")[0]
SPEC = LayerSpec(
    "rows8", f"{__name__}:Int8", classes=(f"{ROOT}:Int8Linear", f"{ROOT}:PackedLinear"), summary="int8 rows"
)


class Plugin:
    """A plug-in of a third party's."""

    def __init__(self, *specs: LayerSpec) -> None:
        self.specs = specs

    @ak.hookimpl
    def adapterkit_register_layers(self) -> list[LayerSpec]:
        return list(self.specs)


@pytest.fixture
def taught() -> Iterator[None]:
    ak.get_plugin_manager().register(Plugin(SPEC), name="rows8")
    yield
    ak.get_plugin_manager().unregister(name="rows8")


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def dense(model: Net) -> nn.Module:
    """The same function of plain layers."""
    plain: Any = copy.deepcopy(model)
    handler = Int8()
    for name in ("up", "down"):
        layer = getattr(model, name)
        weight = handler.weight(layer, WeightLayout("linear"))
        setattr(plain, name, handler.dense(layer, WeightLayout("linear"), weight, getattr(layer, "bias", None)))
    return plain


TYPES = {
    "LoRA": ak.LoRA(rank=2, targets="*"),
    "PiSSA": ak.LoRA(rank=2, targets="*", init="pissa"),
    "OLoRA": ak.LoRA(rank=2, targets="*", init="olora"),
    "DoRA": ak.DoRA(rank=2, targets="*"),
}


@pytest.mark.usefixtures("taught")
def test_layers_that_a_handler_knows_are_points() -> None:
    assert ak.points(net()).ids == ak.points(dense(net())).ids
    assert [point.path for point in ak.points(net())] == ["up", "down", "head"]
    assert all(point.layout.access == "call" for point in ak.points(net())[:2])  # type: ignore[union-attr]


def test_without_a_handler_they_are_what_their_class_says() -> None:
    assert [point.path for point in ak.points(net())] == ["up", "head"]


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", TYPES)
def test_every_type_acts_as_on_plain_layers(name: str, tmp_path: Path) -> None:
    model, plain = net(), dense(net())
    ours, theirs = ak.Adapters(model), ak.Adapters(plain)
    ours.add("a", TYPES[name])
    theirs.add("a", TYPES[name])
    start = zip(ours.parameters("a"), theirs.parameters("a"), strict=True)
    assert all(torch.allclose(own, other, atol=1e-6) for own, other in start)
    assert torch.allclose(model(X), plain(X), atol=1e-6)
    ours.save("a", tmp_path / "a.safetensors")
    for adapters in (ours, theirs):
        randomize(adapters, "a")
    assert torch.allclose(model(X), plain(X), atol=1e-6)
    model(X).square().mean().backward()
    plain(X).square().mean().backward()
    for own, other in zip(ours.parameters("a"), theirs.parameters("a"), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert torch.allclose(own.grad, other.grad, atol=1e-5)


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", TYPES)
def test_files_fit_both_sorts_of_layers(name: str, tmp_path: Path) -> None:
    model = net()
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES[name])
    randomize(adapters, "a")
    expected, file = model(X), tmp_path / "a.safetensors"
    adapters.save("a", file)
    for other, same in ((net(), torch.equal), (dense(net()), torch.allclose)):
        handle = ak.Adapters(other)
        handle.load(file, name="b")
        handle.activate("b")
        assert same(other(X), expected)


class Counted:
    calls = 0


def counted(*_: object) -> None:
    Counted.calls += 1


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", TYPES)
def test_a_merge_is_a_plain_layer_for_as_long(name: str) -> None:
    model = net()
    before, base = {key: value.clone() for key, value in model.state_dict().items()}, model(X)
    model.up.register_forward_hook(counted)
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES[name])
    randomize(adapters, "a")
    up, expected, count = model.up, model(X), Counted.calls
    adapters.merge()
    assert model.up is up
    model(X)
    assert Counted.calls == count + 1  # a user's hooks are on the layer, whatever it is made of
    assert type(model.up).__mro__[1] is nn.Linear
    assert torch.allclose(model(X), expected, atol=1e-6)
    assert model.state_dict()["up.weight"].dtype == torch.float32
    with pytest.raises(errors.StateError):
        adapters.activate(None)
    copied = copy.deepcopy(model)
    ak.Adapters(copied).unmerge()
    assert torch.equal(copied(X), expected)
    adapters.unmerge()
    assert isinstance(model.up, Int8Linear)
    assert torch.equal(model(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copied))(X), expected)
    adapters.activate(None)
    assert torch.equal(model(X), base)
    adapters.merge("a")
    adapters.detach()
    assert type(model.up) is Int8Linear
    assert type(model.down) is PackedLinear
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), base)
    count = Counted.calls
    model(X)
    assert Counted.calls == count + 1


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", TYPES)
def test_ones_own_block_sees_the_layer_beneath_a_merge(name: str) -> None:
    model = net()
    base, adapters = model(X), ak.Adapters(model)
    adapters.add("a", TYPES[name])
    randomize(adapters, "a")
    with adapters.disabled():
        adapters.merge("a")
        assert torch.equal(model(X), base)
    assert not torch.allclose(model(X), base)


@pytest.mark.usefixtures("taught")
def test_a_bias_comes_with_a_merge_where_the_layer_has_none() -> None:
    model = net()
    handler = Int8()
    weight, bias = torch.randn(6, 8), torch.randn(6)
    made = handler.dense(model.down, WeightLayout("linear"), weight, bias)
    x = torch.randn(2, 8)
    assert torch.equal(made(x), F.linear(x, weight, bias))
    assert not any(parameter.requires_grad for parameter in made.parameters())
    with pytest.raises(errors.NotMergeableError, match="Int8 makes no plain layer of the form 'conv'"):
        handler.dense(
            model.down, WeightLayout("conv", kernel=(1,), stride=(1,), padding=(0,), dilation=(1,)), weight, None
        )


@pytest.mark.usefixtures("taught")
def test_one_gateway_reads_the_weight() -> None:
    model = net()
    point = ak.points(model)[0]
    expected = model.up.weight * model.up.scale  # type: ignore[operator]
    weight, bias = base_weight(model.up, point)
    assert weight is not None
    assert torch.equal(weight, expected)
    assert bias is not None
    assert torch.equal(bias, model.up.bias)
    held, own = stored_weight(model.head, WeightLayout("linear"))
    assert held is model.head.weight
    assert own is model.head.bias


@pytest.mark.usefixtures("taught")
def test_it_compiles_whole() -> None:
    model = net()
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES["DoRA"])
    randomize(adapters, "a")
    expected = model(X)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(X), expected, atol=1e-6)


def test_a_tensor_tells_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library keeps torch's layers and changes what their weight is."""
    monkeypatch.setattr(Int8, "weight", lambda self, module, layout: module.weight.as_subclass(Tensor) + 1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 3).as_subclass(Coded), requires_grad=False)
    ak.get_plugin_manager().register(Plugin(LayerSpec("coded", SPEC.target, classes=(f"{ROOT}:Coded",))), name="coded")
    try:
        weight, _ = stored_weight(model[0], WeightLayout("linear"))
        assert weight is not None
        assert torch.equal(weight, torch.ones(2, 3))
        assert stored_weight(model[1], WeightLayout("linear"))[0] is model[1].weight
    finally:
        ak.get_plugin_manager().unregister(name="coded")


# -- without the teaching, errors as ever; and those of a bad teacher ------------------------------------------------


def test_untaught_errors_are_typed(tmp_path: Path) -> None:
    model = net()
    adapters = ak.Adapters(model)
    for name in ("PiSSA", "OLoRA", "DoRA"):
        with pytest.raises(errors.IncompatibleTargetError, match="no dense floating-point weight there"):
            adapters.add("a", TYPES[name])
    plain = ak.Adapters(nn.Sequential(OrderedDict(up=nn.Linear(5, 8), head=nn.Linear(6, 4))))
    plain.add("dora", TYPES["DoRA"])
    plain.save("dora", tmp_path / "dora.safetensors")
    with pytest.warns(UserWarning, match="made for another base"):
        adapters.load(tmp_path / "dora.safetensors", name="dora", strict=False)
    adapters.activate("dora")
    with pytest.raises(errors.AttachError, match="there is no dense one"):
        model(X)
    adapters.remove("dora")
    adapters.add("a", TYPES["LoRA"])
    with pytest.raises(errors.NotMergeableError, match="holds no dense floating-point weight"):
        adapters.merge()


def raising(*_: object) -> Any:
    raise KeyError("scale")


BAD = [
    ("weight", raising, "layer handler Int8: weight() raised KeyError"),
    ("weight", lambda *_: None, "weight(): returned None; expected a tensor"),
    ("weight", lambda self, module, layout: module.weight, "returned a tensor of torch.int8; expected a tensor"),
    ("dense", raising, "layer handler Int8: dense() raised KeyError"),
    ("dense", lambda self, module, *_: module, "expected another module"),
    ("dense", lambda *_: None, "dense(): returned None at linear@model.up; expected another module"),
    ("layout", raising, "layer handler Int8: layout() raised KeyError"),
]


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize(("method", "answer", "reason"), BAD)
def test_a_bad_handler_is_named(method: str, answer: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = model(X)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="path:up"))
    adapters.activate(None)
    monkeypatch.setattr(Int8, method, answer)
    with pytest.raises(errors.PluginError) as caught:
        ak.Adapters(model).merge("a") if method != "layout" else ak.points(model)
    assert reason in str(caught.value)
    assert caught.value.plugin == "rows8"
    assert torch.equal(model(X), before)


@pytest.mark.usefixtures("taught")
def test_two_handlers_of_one_class_are_a_conflict() -> None:
    second = LayerSpec("second", SPEC.target, classes=(f"{ROOT}:Int8Linear",))
    ak.get_plugin_manager().register(Plugin(second), name="second")
    try:
        with pytest.raises(errors.PluginConflictError, match=r"Int8Linear is claimed by .*rows8.* and by .*second"):
            ak.points(net())
    finally:
        ak.get_plugin_manager().unregister(name="second")
