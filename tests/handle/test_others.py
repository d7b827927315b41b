"""Changes while others are in a block or in a call: they are refused, or wait, or reach nobody in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.handle import merging
from adapterkit.testing import toys
from tests.engine import test_read_weights
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ak.LoRA(rank=2, targets="attn.q mlp.up"))
        randomize(adapters, name, i)
    adapters.activate(None)
    return adapters


def run(model: nn.Module, adapters: ak.Adapters, choice: object) -> Tensor:
    with adapters.activated(choice):  # type: ignore[arg-type]
        return model(X)


@contextlib.contextmanager
def elsewhere(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Another thread, which is where it calls its argument for as long as the block lasts."""
    there, go = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def pause() -> None:
        there.set()
        assert go.wait(timeout=60)

    def guarded() -> None:
        try:
            work(pause)
        except BaseException as error:  # noqa: BLE001  (the test fails with it)
            failed.append(error)
            there.set()

    thread = threading.Thread(target=guarded)
    thread.start()
    assert there.wait(timeout=60)
    assert not failed
    try:
        yield
    finally:
        go.set()
        thread.join()
    assert not failed


def in_block(
    model: nn.Module, block: Callable[[], contextlib.AbstractContextManager[None]], expected: Tensor
) -> Callable[[Callable[[], None]], None]:
    def work(pause: Callable[[], None]) -> None:
        with block():
            pause()
            assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-12)

    return work


def in_call(model: nn.Module, found: list[Tensor]) -> Callable[[Callable[[], None]], None]:
    def work(pause: Callable[[], None]) -> None:
        hook = model.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: pause())
        found.append(model(X))
        hook.remove()

    return work


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, "b", {"a": 0.5}, ["a", "b"]])
def test_no_merge_in_a_block_of_another_thread(model: toys.ToyModel, adapters: ak.Adapters, choice: object) -> None:
    expected = run(model, adapters, choice)
    with elsewhere(in_block(model, lambda: adapters.activated(choice), expected)):  # type: ignore[arg-type]
        with pytest.raises(errors.StateError, match="block of another thread or task"):
            adapters.merge("a")
        with pytest.raises(errors.StateError, match="block of another thread or task"):
            adapters.bake("a")
    adapters.merge("a")


def test_no_merge_where_rows_are_routed(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    routes = ["a", "b", None][: len(X)]
    with adapters.routed(routes):
        expected = model(X)
    told = pytest.raises(errors.StateError, match="block of another thread or task")
    with elsewhere(in_block(model, lambda: adapters.routed(routes), expected)), told:
        adapters.merge("a")


def test_a_merge_beside_blocks_of_the_same(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = run(model, adapters, {"a": 0.5})
    with elsewhere(in_block(model, lambda: adapters.activated({"a": 0.5}), expected)):
        adapters.merge({"a": 0.5})
        assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-12)
    adapters.unmerge()


def test_no_merge_in_a_block_of_another_task(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    async def hold() -> None:
        with adapters.disabled():
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(errors.StateError, match="block of another thread or task"):
            adapters.merge("a")
        await task
        adapters.merge("a")

    asyncio.run(main())


def test_no_merge_in_a_call_of_another_thread(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    expected, found = model(X), []
    with elsewhere(in_call(model, found)):
        for attempt in (adapters.merge, adapters.bake, adapters.detach, lambda: adapters.remove("a")):
            with pytest.raises(errors.StateError, match="another thread is in a call"):
                attempt()
        adapters.remove("b")  # which acts nowhere
    assert torch.equal(found[0], expected)
    adapters.merge()
    with elsewhere(in_call(model, found)), pytest.raises(errors.StateError, match="another thread is in a call"):
        adapters.unmerge()
    assert torch.allclose(found[1], expected, rtol=1e-12, atol=1e-12)


def test_a_call_of_another_model_is_no_hindrance(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    with elsewhere(in_call(toys.ToyModel().double(), [])):
        adapters.merge("a")


def test_calls_that_begin_while_weights_change_wait(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    expected, found = model(X), []
    with adapters._state.switch.held():
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        adapters.merge()  # what waits has not begun
        adapters.unmerge()
    thread.join(timeout=60)
    assert torch.equal(found[0], expected)


def test_serving_beside_merges(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate("a")
    expected, done = model(X), threading.Event()
    wrong: list[Tensor] = []

    def serve() -> None:
        while not done.is_set():
            if not torch.allclose(y := model(X), expected, rtol=1e-12, atol=1e-12):
                wrong.append(y)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    merged = 0
    for _ in range(60):
        with contextlib.suppress(errors.StateError):
            adapters.merge()
            merged += 1
        with contextlib.suppress(errors.StateError):
            adapters.unmerge()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("targets", "choice"),
    [
        ("linear", None),
        ("linear", {"a": 0.5}),
        ("linear", ak.Stack("a", "b")),
        ("attn.{q,v}", "b"),
        ("embed.tokens", "b"),
        ("norm", None),
        ("norm", "b"),
        ("moe.up", None),
        ("moe.up", "b"),
    ],
)
def test_a_merge_leaves_ones_own_block_what_it_is(targets: str, choice: object) -> None:
    model: nn.Module
    if targets == "moe.up":
        test_read_weights.register()
        model = test_read_weights.ReadModel(test_read_weights.Stack()).double()
        x = torch.randn(3, test_read_weights.D, dtype=torch.float64)
    else:
        toys.register()
        model, x = toys.ToyModel().double().eval(), X
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ak.Trainable(targets) if targets == "norm" else ak.LoRA(rank=2, targets=targets))
        randomize(adapters, name, i)
    with adapters.activated("a"):
        merged = model(x)
    with adapters.activated(choice):  # type: ignore[arg-type]
        expected = model(x)
        adapters.merge("a")
        assert torch.equal(model(x), expected)
        with pytest.raises(errors.StateError, match="unmerge"):
            adapters.disabled().__enter__()
    assert torch.allclose(model(x), merged, rtol=1e-12, atol=1e-12)
    adapters.unmerge()
    with adapters.activated(choice):  # type: ignore[arg-type]
        assert torch.equal(model(x), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiles_anew")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_says_what_it_cannot_tell_apart(
    model: toys.ToyModel, adapters: ak.Adapters, fullgraph: bool
) -> None:
    merged = run(model, adapters, "a")
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    with adapters.disabled():
        base = compiled(X)
        adapters.merge("a")
        if fullgraph:
            with pytest.raises(Exception, match="merged in a block"):
                compiled(X)
        else:
            assert torch.allclose(compiled(X), base, rtol=1e-12, atol=1e-12)
    assert torch.allclose(compiled(X), merged, rtol=1e-12, atol=1e-12)


def test_a_task_that_outlives_its_block(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = run(model, adapters, "b")

    async def late() -> Tensor:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return model(X)

    async def main() -> None:
        with adapters.activated("b"):
            task = asyncio.create_task(late())
        await asyncio.sleep(0)
        adapters.merge("a")
        assert torch.equal(await task, expected)
        adapters.unmerge()
        with adapters.activated("b"):
            task = asyncio.create_task(late())
        await asyncio.sleep(0)
        adapters.remove("b")
        with pytest.raises(errors.StateError, match="'b' was removed"):
            await task

    asyncio.run(main())


def test_threads_begin_outside_of_all_blocks(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    base, found = model(X), []
    with adapters.activated("a"), ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(model, X).result())
    assert torch.equal(found[0], base)


def test_a_merge_that_is_interrupted_changes_nothing(
    model: toys.ToyModel, adapters: ak.Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(model, adapters, "a")
    real, left = merging.replace_parameter, [2]

    def replace(*args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(merging, "replace_parameter", replace)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge("a")
    assert torch.equal(run(model, adapters, "a"), expected)


def test_only_forwards_in_the_block_are_observed(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    def started(other: bool) -> dict[str, Tensor]:
        adapters.add("eva", ak.LoRA(rank=2, targets="attn.q", init="eva"))
        with adapters.observing("eva"):
            model(X)
            if other:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(model, toys.ids(3, seed=5)).result()
                with adapters.disabled():
                    model(X)
            else:
                model(X)
        found = {key: tensor.clone() for key, tensor in adapters.state_dict("eva").items()}
        adapters.remove("eva")
        return found

    alone, beside = started(False), started(True)
    assert all(torch.equal(tensor, beside[key]) for key, tensor in alone.items())


# --- removing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", ["remove", "detach"])
def test_what_another_thread_has_is_not_removed(model: toys.ToyModel, adapters: ak.Adapters, attempt: str) -> None:
    expected = run(model, adapters, "a")
    with elsewhere(in_block(model, lambda: adapters.activated("a"), expected)):
        with pytest.raises(errors.StateError, match="'a'"):
            adapters.remove("a") if attempt == "remove" else adapters.detach()
        assert list(adapters) == ["a", "b"]
        adapters.remove("b")
    adapters.remove("a")
    assert not len(adapters)


def test_what_another_task_has_is_not_removed(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    async def hold(started: asyncio.Event, end: asyncio.Event) -> None:
        with adapters.routed(["a"] * len(X)):
            started.set()
            await end.wait()
            assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-12)

    async def main() -> None:
        started, end = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(started, end))
        await started.wait()
        with pytest.raises(errors.StateError, match="'a'"):
            adapters.remove("a")
        end.set()
        await task
        adapters.remove("a")

    expected = run(model, adapters, "a")
    asyncio.run(main())


# --- the first adapter, and forks ------------------------------------------------------------------------------------


def test_first_adapters_of_several_handles_at_once(model: toys.ToyModel) -> None:
    handles = [ak.Adapters(model) for _ in range(4)]
    together = threading.Barrier(len(handles))

    def add(name: str, handle: ak.Adapters) -> None:
        together.wait(timeout=60)
        handle.add(name, ak.LoRA(rank=1, targets="attn.q"))

    threads = [threading.Thread(target=add, args=(f"n{i}", one)) for i, one in enumerate(handles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in handles:
        assert sorted(one) == ["n0", "n1", "n2", "n3"]
    handles[0].detach()
    assert not any(len(one) for one in handles)
    handles[1].add("again", ak.LoRA(rank=1, targets="attn.q"))
    assert all(list(one) == ["again"] for one in handles)


class Slow(ak.LoRA):
    """Takes its time to be built."""

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        building.set()
        assert built.wait(timeout=60)
        return super().build(point)


building, built = threading.Event(), threading.Event()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("first", [True, False])
def test_a_fork_waits_for_a_change(model: toys.ToyModel, first: bool) -> None:
    adapters = ak.Adapters(model)
    if not first:
        adapters.add("old", ak.LoRA(rank=1, targets="attn.q"))
    building.clear()
    built.clear()
    thread = threading.Thread(target=adapters.add, args=("new", Slow(rank=1, targets="attn.q")))
    thread.start()
    assert building.wait(timeout=60)
    threading.Timer(0.1, built.set).start()
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if "new" in adapters else 2
            adapters.add("newer", ak.LoRA(rank=1, targets="attn.q"))
            adapters.detach()
        os._exit(code if not len(adapters) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    adapters.detach()


# --- inference mode --------------------------------------------------------------------------------------------------


def test_what_is_made_in_inference_mode_trains(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    with torch.inference_mode():
        file = adapters.checkpoint("a")
        adapters.add("new", ak.LoRA(rank=2, targets="attn.q"))
        adapters.install("read", file)
        adapters.activate({"new": 0.5, "read": {"*": 0.5}})
    adapters.train("new", "read")
    model(X).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters("read"))
    with torch.inference_mode():
        adapters.merge("read")
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_nothing_trains_on_a_model_of_inference_mode() -> None:
    toys.register()
    with torch.inference_mode():
        model = toys.ToyModel()
    adapters = ak.Adapters(model)
    with pytest.raises(errors.StateError, match="inference_mode"):
        adapters.add("a", ak.LoRA(rank=2))
    assert not len(adapters)
    other = toys.ToyModel()
    ak.Adapters(other).add("a", ak.LoRA(rank=2))
    adapters.install("a", ak.Adapters(other).checkpoint("a"))  # to be used, it may be there
    with torch.inference_mode(), adapters.activated("a"):
        model(X)
    with pytest.raises(errors.StateError, match="inference_mode"):
        adapters.train("a")
    adapters.detach()
