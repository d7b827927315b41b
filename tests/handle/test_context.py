"""Side inputs: `Adapters.context` and `base.context`, at every kind of point."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.errors import ConfigError, ContextError, UnknownNameError
from adapterkit.testing import AdapterConformance, families, models, toys

TASKS = 3


class TaskModule(ak.AdapterModule):
    """Adds a learnt row to the point's output, chosen by the task of each sample."""

    def __init__(self, features: int, axis: int) -> None:
        super().__init__()
        self.axis, self.rows = axis, nn.Parameter(torch.zeros(TASKS, features))

    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        chosen = F.embedding(base.context["task"], self.rows).to(y.dtype)
        between = [1] * (y.ndim - 2)
        shape = [len(y), *between, -1] if self.axis == -1 else [len(y), -1, *between]
        return y + chosen.view(shape)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        y = base(query)
        chosen = F.embedding(base.context["task"], self.rows).to(y.dtype)
        return y + chosen.unflatten(-1, (y.shape[1], -1))[:, :, None]


@dataclass(frozen=True)
class Task(ak.AdapterConfig):
    kinds = frozenset({"weight", "output", "attention", "tokens"})
    targets: str = "attn mlp"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        layout: Any = point.layout
        read = point.kind == "weight" and layout.access == "read"
        return "it is read, or its rows are tokens" if read or point.lengthens else super().accepts(point)

    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        return {"task": torch.randint(0, TASKS, (rows,))}

    def build(self, point: ak.InjectionPoint) -> TaskModule:
        return TaskModule(point.out_features, point.feature_axis)


class ControlModule(ak.AdapterModule):
    """Adds a convolution of a map beside the input of a convolution, [rows, 1, height, width]."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, point.out_features, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y + F.conv2d(base.context["map"].to(y.dtype), self.conv.weight.to(y.dtype), padding=1)


@dataclass(frozen=True)
class Control(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    forms = frozenset({"conv"})
    targets: str = "proj.in"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        return super().accepts(point) or (None if point.role == "proj.in" else "the map has the size of the image")

    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        return {"map": torch.randn(rows, 1, models.IMAGE, models.IMAGE)}

    def build(self, point: ak.InjectionPoint) -> ControlModule:
        return ControlModule(point)


class TaskPositions(ak.AdapterModule):
    """Puts the positions of each sample's task in front of keys, or to the sequence."""

    scalable = False

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        layout: Any = point.layout
        shape = (layout.kv_heads, 2, layout.head_dim) if point.kind == "attention" else (2, point.out_features)
        self.rows = nn.Parameter(torch.zeros(TASKS, *shape))

    def extend(self, keys: Tensor, values: Tensor, base: Any = None) -> tuple[Tensor, Tensor]:
        rows = self.rows[base.context["task"]].to(keys.dtype)
        return torch.cat([rows, keys], dim=2), torch.cat([rows, values], dim=2)

    def lengthen(self, tokens: Tensor, base: Any = None) -> Tensor:
        return self.rows[base.context["task"]].to(tokens.dtype)


@dataclass(frozen=True)
class Positions(Task):
    kinds = frozenset({"attention", "tokens"})
    neutral = False
    targets: str = "attn.kv"

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        return None if point.kind == "attention" or point.lengthens else "the sequence cannot be made longer there"

    def build(self, point: ak.InjectionPoint) -> Any:
        return TaskPositions(point)


class TestPositions(AdapterConformance):
    config = Positions()


class TestTask(AdapterConformance):
    config = Task()


class TestControl(AdapterConformance):
    config = Control()


def adapted(targets: str = "attn mlp", name: str = "a") -> tuple[toys.ToyModel, ak.Adapters]:
    toys.register()
    model = toys.ToyModel().double().eval()
    return model, added(ak.Adapters(model), targets, name)


def added(adapters: ak.Adapters, targets: str, name: str) -> ak.Adapters:
    adapters.add(name, Task(targets=targets))
    for parameter in adapters.parameters(name):
        nn.init.normal_(parameter)
    return adapters


def run_alone(model: nn.Module, adapters: ak.Adapters, x: Tensor, tasks: Sequence[int]) -> Tensor:
    rows = []
    for row, task in zip(x, tasks, strict=True):
        with adapters.context(task=torch.tensor([task])):
            rows.append(model(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("targets", ["attn mlp", "attn.q attn.o mlp.up", "embed.tokens", "conv", "attn.kv", "tokens"])
def test_every_kind_of_point_sees_its_rows(targets: str) -> None:
    model, adapters = adapted(targets)
    x, tasks = toys.ids(3), torch.tensor([2, 0, 1])
    with adapters.context(task=tasks):
        together = model(x)
    assert torch.allclose(together, run_alone(model, adapters, x, [2, 0, 1]), atol=1e-10)
    with adapters.context(task=torch.tensor([1])):
        for_all = model(x)
    assert torch.allclose(for_all, run_alone(model, adapters, x, [1, 1, 1]), atol=1e-10)
    assert not torch.allclose(for_all, together)


@pytest.mark.parametrize("united", [False, True])
@pytest.mark.parametrize("targets", ["attn.kv", "prompt"])
def test_positions_see_their_rows(targets: str, united: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11)).double().eval()
    adapters = ak.Adapters(model)
    config: ak.AdapterConfig = Positions(targets=targets)
    adapters.add("a", ak.Union((config, ak.LoRA(rank=1))) if united else config)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    x, tasks = toys.ids(3), [2, 0, 1]
    alone = []
    for row, task in zip(x, tasks, strict=True):
        with adapters.context(task=torch.tensor([task])):
            alone.append(model(row[None]).logits)
    with adapters.context(task=torch.tensor(tasks)):
        assert torch.allclose(model(x).logits, torch.cat(alone), atol=1e-9)
    with pytest.raises(ContextError, match=r"'task'"):
        model(x)


@pytest.mark.parametrize("choice", [ak.Stack("a", "b"), ["a", "b"], ak.Average("a", "b"), {"a": 0.5, "b": 2.0}])
@pytest.mark.parametrize("targets", ["attn mlp", "attn.q", "attn.kv"])
def test_adapters_beside_and_around_each_other_see_it(choice: Any, targets: str) -> None:
    model, adapters = adapted(targets)
    added(adapters, targets, "b")
    adapters.activate(choice)
    with adapters.context(task=torch.tensor([2, 0, 1])):
        together = model(toys.ids(3))
    assert torch.allclose(together, run_alone(model, adapters, toys.ids(3), [2, 0, 1]), atol=1e-10)


def test_routed_rows_have_their_own() -> None:
    model, adapters = adapted()
    added(adapters, "attn", "b")
    x = toys.ids(4)
    with adapters.routed(["b", None, "a", "b"]), adapters.context(task=torch.tensor([2, 0, 1, 1])):
        together = model(x)
    for row, (name, task) in enumerate([("b", 2), (None, 0), ("a", 1), ("b", 1)]):
        with adapters.activated(name), adapters.context(task=torch.tensor([task])):
            assert torch.allclose(together[row : row + 1], model(x[row : row + 1]), atol=1e-10)


def test_gradients_reach_the_tasks_of_the_batch_alone() -> None:
    model, adapters = adapted("mlp")
    with adapters.context(task=torch.tensor([0, 2, 0])):
        model(toys.ids(3)).square().sum().backward()
    for parameter in adapters.parameters("a"):
        assert parameter.grad is not None
        assert parameter.grad[[0, 2]].abs().sum(-1).gt(0).all()
        assert not parameter.grad[1].any()


def test_a_map_beside_a_convolution() -> None:
    families.register()
    example = next(one for one in models.EXAMPLES if one.name == "diffusion")
    model: Any = example.make().double().eval()
    adapters = ak.Adapters(model)
    adapters.add("control", Control())
    (module,) = adapters.modules("control").values()
    nn.init.normal_(module.conv.weight)  # type: ignore[union-attr,arg-type]
    x, image = torch.randn(2, 3, models.IMAGE, models.IMAGE).double(), torch.randn(2, 1, models.IMAGE, models.IMAGE)
    with adapters.context(map=image):
        found = model.conv_in(x)
    with adapters.disabled():
        expected = model.conv_in(x) + module.conv(image.double())  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-10)


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["attn", "attn.q", "attn.kv", "tokens"])
def test_a_missing_one_is_an_error_that_names_the_block(targets: str) -> None:
    model, adapters = adapted(targets)
    with pytest.raises(ContextError, match=r"'task'.*with adapters\.context\(task=\.\.\.\)"):
        model(toys.ids())
    with adapters.disabled():
        model(toys.ids())


@pytest.mark.parametrize("targets", ["attn", "attn.q", "attn.kv", "tokens"])
def test_wrong_rows_are_an_error(targets: str) -> None:
    model, adapters = adapted(targets)
    with pytest.raises(ContextError, match=r"'task' has 2 rows, .* has 3"), adapters.context(task=torch.tensor([0, 1])):
        model(toys.ids(3))


def test_names_that_nobody_reads_are_errors() -> None:
    _, adapters = adapted()
    with pytest.raises(UnknownNameError, match="Did you mean 'task'"), adapters.context(tasks=torch.tensor([0])):
        pass
    adapters.detach()
    with (
        pytest.raises(UnknownNameError, match="No adapter on the model reads any"),
        adapters.context(task=torch.ones(1)),
    ):
        pass


@pytest.mark.parametrize("value", [torch.tensor(1), [0, 1], None, "a"])
def test_what_has_no_rows_is_an_error(value: Any) -> None:
    _, adapters = adapted()
    with pytest.raises(ConfigError, match=r"task must be a tensor \[rows"), adapters.context(task=value):
        pass


# --- blocks ----------------------------------------------------------------------------------------------------------


class Both(TaskModule):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        assert set(base.context) == {"task", "other"}
        assert len(base.context) == 2
        assert base.context.get("nothing") is None
        assert "nothing" not in base.context
        return super().forward(x, base) + base.context["other"].view(-1, 1, 1)


@dataclass(frozen=True)
class TaskAndOther(Task):
    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        return {**super().example_context(points, rows), "other": torch.randn(rows)}

    def build(self, point: ak.InjectionPoint) -> TaskModule:
        return Both(point.out_features, point.feature_axis)


def test_nested_blocks_add_and_the_inner_one_wins() -> None:
    toys.register()
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", TaskAndOther())
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter)
    one, two, other = torch.tensor([1]), torch.tensor([2]), torch.tensor([0.5])
    with adapters.context(task=two, other=other):
        expected = model(toys.ids())
    with adapters.context(task=one):
        with adapters.context(other=other):
            outer = model(toys.ids())
            with adapters.context(task=two):
                assert torch.equal(model(toys.ids()), expected)
            assert torch.equal(model(toys.ids()), outer)
            assert not torch.equal(outer, expected)
        with pytest.raises(AssertionError):
            model(toys.ids())
    with pytest.raises(ZeroDivisionError), adapters.context(task=one, other=other):
        raise ZeroDivisionError
    with pytest.raises(AssertionError):
        model(toys.ids())


def test_threads_see_their_own() -> None:
    model, adapters = adapted()
    together, found = threading.Barrier(3), {}
    expected = [run_alone(model, adapters, toys.ids(2), [task, task]).detach() for task in range(3)]

    def serve(task: int) -> None:
        with adapters.context(task=torch.tensor([task])):
            for _ in range(5):
                together.wait(timeout=60)
                found[task] = model(toys.ids(2)).detach()

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for task in range(3):
        assert torch.allclose(found[task], expected[task], atol=1e-10)
    with pytest.raises(ContextError):
        model(toys.ids(2))


def test_a_copy_made_inside_a_block_is_outside_of_it() -> None:
    model, adapters = adapted()
    with adapters.context(task=torch.tensor([1])):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(ContextError):
                other(toys.ids())


# --- checkpointing and torch.compile ---------------------------------------------------------------------------------


def test_what_is_recomputed_outside_of_the_block_sees_it() -> None:
    model, adapters = adapted()
    tasks = torch.tensor([2, 0, 1])
    with adapters.context(task=tasks):
        model(toys.ids(3)).square().sum().backward()
    expected = [p.grad.clone() for p in adapters.parameters("a") if p.grad is not None]
    model.zero_grad()
    run: Any = {"use_reentrant": False, "preserve_rng_state": False}
    with adapters.context(task=tasks):
        y = checkpoint(model, toys.ids(3), context_fn=adapters.recompute_context, **run)
        bare = checkpoint(model, toys.ids(3), **run)
    with adapters.context(task=torch.tensor([1])):  # another block around the backward
        y.square().sum().backward()  # type: ignore[union-attr]
    for parameter, grad in zip(adapters.parameters("a"), expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, grad, atol=1e-10)
    with pytest.raises(ContextError):
        bare.square().sum().backward()  # type: ignore[union-attr]


@pytest.fixture
def _no_recompiles() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_recompiles")
@pytest.mark.parametrize("targets", ["attn", "attn.q", "attn.kv", "tokens"])
def test_another_tensor_of_the_shape_compiles_nothing_new(targets: str) -> None:
    model, adapters = adapted(targets)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        with adapters.context(task=torch.tensor([2, 0, 1])):
            first = compiled(toys.ids(3))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tasks in ([2, 0, 1], [0, 0, 1], [1, 2, 0]):
                with adapters.context(task=torch.tensor(tasks)):
                    found = compiled(toys.ids(3))
                assert torch.allclose(found, run_alone(model, adapters, toys.ids(3), tasks), atol=1e-10)
    assert not torch.allclose(first, found)
