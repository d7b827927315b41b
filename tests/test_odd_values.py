"""Configs are made from what files and people say: whatever that is, it is a config or a ConfigError."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import adapterkit as ak
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import Kind
from adapterkit.selectors import Selector, Table


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "too large for a float": 10**400,
    "too long to be shown": 10**5000,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "text of 5,000 characters": "a" * 5000,
    "a control sequence": "\x1b[2J",
    "bytes": b"x",
    "a list of unhashable": [{}],
    "a tuple of infinite": (float("inf"), "a"),
    "a mapping to too large": {"attn.q": 10**400},
    "pairs to too large": [["attn.q", 10**400]],
    "a mapping of no text": {None: 1},
    "a selector that is none": {"{a{": 1},
    "nested deeply": deep(),
}


@pytest.mark.parametrize("odd", ODD)
def test_every_field_of_every_type_takes_a_value_or_says_no(odd: str):
    said: list[str] = []
    for spec in get_plugin_manager().adapters().values():
        cls = class_of(spec, ak.AdapterConfig)
        for name in (field.name for field in dataclasses.fields(cls)):
            for make in (lambda c, n: c(**{n: ODD[odd]}), lambda c, n: c.from_dict({n: ODD[odd]})):
                try:
                    make(cls, name)
                except ak.AdapterKitError as error:
                    said.append(str(error))
    assert all(text.isprintable() and len(text) < 2000 for text in said)


@pytest.mark.parametrize("key", ["alphas", "ranks"])
def test_a_number_by_selector_is_named_with_its_selector(key: str):
    with pytest.raises(ak.ConfigError, match=rf"{key}\['attn.q'\] must be"):
        ak.LoRA.from_dict({key: {"attn.q": 10**400}})


def test_an_integer_of_thousands_of_digits_is_named_by_its_size():
    with pytest.raises(ak.ConfigError, match=r"rank must be int, not a value of type int of 16,610 bits"):
        ak.LoRA(rank=10**5000)


@dataclass(frozen=True)
class Careless(ak.AdapterConfig):
    """A type whose own check expects what its author expected."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    sizes: Any = None

    def problems(self) -> list[str]:
        return [] if max(self.sizes) < 5 else ["too large"]


def test_a_check_that_fails_is_a_problem_of_the_values():
    with pytest.raises(ak.ConfigError, match=r"invalid Careless: the values cannot be checked: TypeError: .*'int'"):
        Careless(sizes=3)


def test_a_type_that_says_no_kinds_is_told_so_when_it_is_used():
    @dataclass(frozen=True)
    class Square(ak.AdapterConfig):
        pass

    @dataclass(frozen=True)
    class Circle(ak.AdapterConfig):
        kinds: ClassVar[Any] = frozenset({"outputs"})

    @dataclass(frozen=True)
    class Line(ak.AdapterConfig):
        kinds: ClassVar[Any] = "output"

    with pytest.raises(ak.ConfigError, match=r"invalid Square: .* \(of attention, .*\), and has none: set `kinds`"):
        Square()
    with pytest.raises(ak.ConfigError, match=r"not \['outputs'\]"):
        Circle()
    with pytest.raises(ak.ConfigError, match="not 'output'"):
        Line()


BRACES = "".join("{a,b}" for _ in range(9))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Table({f"{BRACES}@layer!={i}": 1 for i in range(1200)}),
        lambda: Selector(" ".join(f"{BRACES}{i}@layer!={i}" for i in range(1200))),
        lambda: ak.Union(tuple(ak.LoRA(targets=" ".join(f"{BRACES}{i}" for i in range(16))) for _ in range(33))),
        lambda: ak.LoRA(ranks={f"{BRACES}{i}": 1 for i in range(60)}),
    ],
)
def test_braces_of_braces_are_refused_in_no_time(make: Any):
    began = time.process_time()
    with pytest.raises((ak.SelectorError, ak.ConfigError)):
        make()
    assert time.process_time() - began < 6  # a bomb takes minutes, and machines differ


def test_braces_of_words_that_many_write_are_read():
    table = Table({f"{role}.{{q,k,v,o}}@layer={i}": i for i in range(400) for role in ("attn", "cross")})
    assert table is not None
