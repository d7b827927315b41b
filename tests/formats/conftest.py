"""A good file and a model that must survive bad ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.testing import toys
from tests.formats.spoiling import Refusal, with_adapter


@pytest.fixture
def model() -> nn.Module:
    return toys.ToyModel()


@pytest.fixture
def adapters(model: nn.Module) -> ak.Adapters:
    return with_adapter(model)


@pytest.fixture
def file(tmp_path: Path, adapters: ak.Adapters) -> Path:
    """A good file, to be spoilt."""
    return adapters.save("good", tmp_path / "bad.safetensors")


@pytest.fixture
def nobody() -> Iterator[None]:
    """Takes root's rights away, where the tests run as root: root may read and write everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.fixture
def refused(adapters: ak.Adapters, model: nn.Module) -> Refusal:
    """Loads a file that must be refused; gives the error."""
    return Refusal(adapters, model)
