"""`with` blocks of threads, asyncio tasks and generators: each sees its own, and nothing remains of any."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()
CHOICES: list[str | None] = ["a", "b", None]
OVERLAP = pytest.warns(UserWarning, match="while one entered after it was open")


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


@pytest.fixture
def expected(model: toys.ToyModel, adapters: ak.Adapters) -> dict[str | None, Tensor]:
    found: dict[str | None, Tensor] = {}
    for choice in CHOICES:
        with adapters.activated(choice):
            found[choice] = model(X)
    return found


async def serve(
    call: Callable[[Tensor], Tensor], adapters: ak.Adapters, choice: str | None, expected: dict[str | None, Tensor]
) -> None:
    for _ in range(3):
        with adapters.activated(choice):
            await asyncio.sleep(0)
            assert torch.allclose(call(X), expected[choice], rtol=1e-12, atol=1e-12)
        await asyncio.sleep(0)
        assert torch.allclose(call(X), expected[None], rtol=1e-12, atol=1e-12)


def test_tasks_see_their_own(model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]) -> None:
    async def main() -> None:
        await asyncio.gather(*(serve(model, adapters, choice, expected) for choice in CHOICES))

    asyncio.run(main())
    assert torch.equal(model(X), expected[None])
    adapters.activate("a")


@pytest.mark.slow
@pytest.mark.usefixtures("_compiles_anew")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_tasks_see_their_own_in_a_compiled_model(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor], fullgraph: bool
) -> None:
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")

    async def main() -> None:
        await asyncio.gather(*(serve(compiled, adapters, choice, expected) for choice in CHOICES))

    asyncio.run(main())
    with torch.compiler.set_stance("fail_on_recompile"):
        asyncio.run(main())


def test_routes_of_tasks_are_their_own(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    async def route(routes: list[str | None]) -> None:
        with adapters.routed(routes):
            await asyncio.sleep(0)
            y = model(X[:1].expand(3, -1))
        for row, choice in zip(y, routes, strict=True):
            assert torch.allclose(row, expected[choice][0], rtol=1e-12, atol=1e-12)

    async def main() -> None:
        await asyncio.gather(route(["a", "b", None]), route([None, "a", "b"]), route(["b", None, "a"]))

    asyncio.run(main())


def test_a_task_keeps_what_it_was_started_in(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    async def late() -> Tensor:
        await asyncio.sleep(0)
        with adapters.disabled():
            await asyncio.sleep(0)
        return model(X)

    async def main() -> None:
        tasks = []
        for choice in CHOICES:
            with adapters.activated(choice):
                tasks.append(asyncio.create_task(late()))
                tasks.append(asyncio.create_task(asyncio.to_thread(model, X)))
        for choice, a, b in zip(CHOICES, tasks[::2], tasks[1::2], strict=True):
            assert torch.equal(await a, expected[choice])
            assert torch.equal(await b, expected[choice])

    asyncio.run(main())


def test_a_step_of_a_task_is_its_own(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    def weight(point: object, step: int) -> float:
        return float(step)

    seen: dict[int, Tensor] = {}

    async def denoise(step: int) -> None:
        await asyncio.sleep(0)
        adapters.at_step(step)
        await asyncio.sleep(0)
        seen[step] = model(X)

    async def main() -> None:
        with adapters.activated({"a": weight}):
            await asyncio.gather(denoise(1), denoise(2))
            seen[0] = model(X)

    asyncio.run(main())
    for step in range(3):
        with adapters.activated({"a": float(step)}):
            assert torch.allclose(seen[step], model(X), rtol=1e-12, atol=1e-12)


# --- generators ------------------------------------------------------------------------------------------------------


def stream(model: toys.ToyModel, adapters: ak.Adapters, choice: str | None) -> Generator[Tensor, None, None]:
    with adapters.activated(choice):
        yield model(X)
        yield model(X)


@pytest.mark.parametrize("nested", [True, False])
def test_generators_leave_nothing_behind(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor], nested: bool
) -> None:
    first, second = stream(model, adapters, "a"), stream(model, adapters, "b")
    next(first)
    next(second)
    if nested:
        second.close()
        assert torch.equal(next(first), expected["a"])
        first.close()
    else:
        with OVERLAP:
            first.close()
        assert torch.equal(next(second), expected["b"])
        second.close()
    assert torch.equal(model(X), expected[None])
    adapters.activate("a")
    assert torch.equal(model(X), expected["a"])


@pytest.mark.filterwarnings("ignore:a block that says what acts was left")
def test_generators_that_take_turns_see_their_own(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    @contextlib.contextmanager
    def chosen(choice: str | None) -> Generator[None, None, None]:
        with adapters.activated("b" if choice == "a" else "a"), adapters.activated(choice):
            yield

    def helped(choice: str | None) -> Generator[Tensor, None, None]:
        with chosen(choice), contextlib.ExitStack() as stack:
            yield model(X)
            stack.enter_context(adapters.disabled())
            assert torch.equal(model(X), expected[None])
            stack.close()
            yield model(X)

    for around in (None, "b"):
        with contextlib.nullcontext() if around is None else adapters.activated(around):
            turns = [make(choice) for choice in CHOICES for make in (lambda c: stream(model, adapters, c), helped)]
            for _ in range(2):
                for i, one in enumerate(turns):
                    assert torch.equal(next(one), expected[CHOICES[i // 2]])
                if around is not None:
                    assert torch.equal(model(X), expected[around])
            for one in turns:
                one.close()
        assert torch.equal(model(X), expected[None])


def test_a_generator_that_is_given_up_ends_its_block(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    assert torch.equal(next(stream(model, adapters, "a")), expected["a"])
    assert torch.equal(model(X), expected[None])


def test_a_generator_may_stand_for_a_block(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    fixture = stream(model, adapters, "a")
    next(fixture)
    assert torch.equal(model(X), expected["a"])
    with adapters.disabled():
        assert torch.equal(model(X), expected[None])
    assert torch.equal(model(X), expected["a"])
    fixture.close()
    assert torch.equal(model(X), expected[None])


@pytest.mark.filterwarnings("ignore:a block that says what acts was left")
def test_asynchronous_generators_of_one_task_see_their_own(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    async def stream(choice: str | None) -> AsyncGenerator[Tensor, None]:
        with adapters.activated(choice):
            for _ in range(2):
                await asyncio.sleep(0)
                yield model(X)

    async def main() -> None:
        turns = {choice: stream(choice) for choice in CHOICES}
        for _ in range(2):
            for choice, one in turns.items():
                assert torch.equal(await anext(one), expected[choice])
        for one in turns.values():
            await one.aclose()
        assert torch.equal(model(X), expected[None])

    asyncio.run(main())


def test_an_outer_block_outlives_generators(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    with adapters.activated("b"):
        first, second = stream(model, adapters, "a"), stream(model, adapters, None)
        next(first)
        next(second)
        with OVERLAP:
            first.close()
        second.close()
        assert torch.equal(model(X), expected["b"])


def test_what_is_left_elsewhere_leaves_nothing_behind(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    for leave in (_in_a_thread, contextvars.Context().run, contextvars.copy_context().run):
        generator = stream(model, adapters, "a")
        next(generator)
        with OVERLAP:
            leave(generator.close)
        assert torch.equal(model(X), expected[None])
        adapters.activate(None)


def _in_a_thread(run: Callable[[], object]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_an_asynchronous_generator_that_is_given_up_leaves_nothing_behind(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    async def stream() -> AsyncIterator[Tensor]:
        with adapters.activated("a"):
            yield model(X)
            yield model(X)

    async def main() -> None:
        async for y in stream():
            assert torch.equal(y, expected["a"])
            break
        gc.collect()
        await asyncio.sleep(0.01)  # the loop ends it in a task of its own
        assert torch.equal(model(X), expected[None])

    with OVERLAP:
        asyncio.run(main())


def test_an_error_in_a_block_leaves_nothing_behind(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    with contextlib.suppress(ZeroDivisionError), adapters.activated("a"), adapters.disabled():
        raise ZeroDivisionError
    assert torch.equal(model(X), expected[None])


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_compiles_anew")
def test_blocks_that_are_compiled_are_seen(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with adapters.activated("a"):
            with adapters.disabled():
                inner = model(x)
            outer = model(x)
        return inner, outer, model(x)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for around in (None, "b"):
        with adapters.activated(around):
            for found, choice in zip(compiled(X), (None, "a", around), strict=True):
                assert torch.allclose(found, expected[choice], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_compiles_anew")
def test_blocks_around_what_cannot_be_compiled_are_seen(
    model: toys.ToyModel, adapters: ak.Adapters, expected: dict[str | None, Tensor]
) -> None:
    def alone(x: Tensor) -> Tensor:
        with adapters.activated("b"):
            assert torch.allclose(model(x), expected["b"], rtol=1e-12, atol=1e-12)
        return model(x)

    uncompiled: Any = torch.compiler.disable(alone)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with adapters.activated("a"):
            return uncompiled(x), model(x)

    for found in torch.compile(run, backend="eager")(X):
        assert torch.allclose(found, expected["a"], rtol=1e-12, atol=1e-12)
    assert torch.equal(model(X), expected[None])
