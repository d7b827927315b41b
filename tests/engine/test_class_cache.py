"""What is made for classes that a program makes while it runs goes with them."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import adapterkit as ak
from adapterkit.engine.attach import adapted_class, is_adapted
from adapterkit.engine.class_cache import made_once
from adapterkit.points import InjectionPoint, Kind
from adapterkit.testing import toys


def test_a_class_that_can_be_imported_has_one_adapted_class():
    kept = weakref.ref(adapted_class(nn.Linear, frozenset()))
    gc.collect()
    assert kept() is adapted_class(nn.Linear, frozenset())
    assert adapted_class(nn.Linear, frozenset({"weight"})) is not kept()


def test_a_class_made_at_run_time_goes_with_its_models():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    twin = copy.deepcopy(model)
    assert type(twin[0]) is type(model[0]) is not Own
    assert is_adapted(model[0])
    adapters.detach()
    assert type(model[0]) is Own
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    assert isinstance(model[0], Own)
    model(torch.ones(1, 4))
    gone = weakref.ref(Own)
    del Own, model, twin, adapters
    gc.collect()
    assert gone() is None


def test_a_type_made_at_run_time_goes_with_its_models(tmp_path: Path):
    @dataclass(frozen=True)
    class Own(ak.LoRA):
        kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})

        def accepts(self, point: InjectionPoint) -> str | None:
            return super().accepts(point)

    adapters = ak.Adapters(toys.ToyModel())
    adapters.add("a", Own(rank=2, targets="linear"))
    adapters.remove("a")
    gone = weakref.ref(Own)
    del Own, adapters
    gc.collect()
    assert gone() is None


def test_what_has_gone_is_made_again():
    class Key:
        pass

    class Made:
        pass

    make = made_once(lambda cls, more: Made())
    first = weakref.ref(held := make(Key, 1))
    assert make(Key, 1) is held
    assert make(Key, 2) is not held
    del held
    gc.collect()
    assert first() is None
    assert isinstance(make(Key, 1), Made)
