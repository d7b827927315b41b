"""Whatever is done to a file, a load works or ends in a typed error, and the model stays as it was."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.errors import CheckpointError
from adapterkit.testing import toys
from tests.formats import forge

COUNT = [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]


class Target:
    """A model to load into, its state, and one good file."""

    def __init__(self, folder: Path) -> None:
        toys.register()
        self.model, self.path = toys.ToyModel(), folder / "fuzzed.safetensors"
        self.adapters = ak.Adapters(self.model)
        self.adapters.add("good", ak.LoRA(rank=2, alpha=3.0, targets="attn.q mlp.up", ranks={"mlp.*": 1}))
        with torch.no_grad():
            for parameter in self.adapters.parameters("good"):
                parameter.normal_()
        self.good = self.adapters.save("good", self.path).read_bytes()
        self.adapters.detach()
        self.paths: set[object] = set()
        self.before, self.types = self._state(), self._types()

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _types(self) -> list[type]:
        return [type(module) for module in self.model.modules()]

    def load(self, data: bytes) -> bool:
        """Whether the file was accepted; anything but success or a typed error fails the test."""
        self.path.write_bytes(data)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                self.adapters.load(self.path, "new")
        except CheckpointError as error:
            self.paths.add(error.path)
            return False
        else:
            assert all(torch.isfinite(parameter).all() for parameter in self.adapters.parameters("new"))
            self.adapters.remove("new")
            return True
        finally:
            assert time.process_time() - start < 1
            assert len(self.adapters) == 0

    def check(self) -> None:
        assert self.paths <= {self.path}
        assert self._types() == self.types
        after = self.model.state_dict()
        assert after.keys() == self.before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in self.before.items())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("fuzz"))


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def overwrite(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start : start + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start:start] = data[start : start + chance.randrange(1, 100)]


def edit_text(data: bytearray, chance: random.Random) -> None:
    """A character of the header becomes another one that JSON knows."""
    place = chance.randrange(8, 8 + int.from_bytes(data[:8], "little"))
    data[place] = chance.choice(b'{}[]",:0123456789eE+-.\\ntfaul')


@pytest.mark.parametrize("count", COUNT)
def test_mutated_bytes(target: Target, count: int) -> None:
    chance, accepted = random.Random(11), 0
    assert target.load(target.good)
    for _ in range(count):
        data = bytearray(target.good)
        chance.choice((flip, overwrite, cut, repeat, edit_text))(data, chance)
        accepted += target.load(bytes(data))
    target.check()
    assert accepted < count / 5


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    value[path[0]] = replaced(value[path[0]], path[1:], change)
    return value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_value_anywhere_in_the_header(target: Target, data: st.DataObject) -> None:
    length = int.from_bytes(target.good[:8], "little")
    outer = json.loads(target.good[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["adapterkit"])
    value = data.draw(values)
    if data.draw(st.booleans()):
        inner = replaced(inner, data.draw(st.sampled_from(places(inner))), lambda _: value)
    else:
        outer = replaced(outer, data.draw(st.sampled_from(places(outer)[1:])), lambda _: value)
    if isinstance(outer.get("__metadata__"), dict) and "adapterkit" in outer["__metadata__"]:
        outer["__metadata__"]["adapterkit"] = json.dumps(inner)
    target.load(forge.raw(json.dumps(outer).encode(), target.good[8 + length :]))
    target.check()
