"""A file and the base it was made for: what the adapter touches must be as it was, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import BaseMismatchError, MissingKeysError
from adapterkit.mapping.family import Weight
from adapterkit.testing import toys
from adapterkit.testing.toys import ToyBackend, ToyModel
from tests.formats import forge

OLD = {"family": "adapterkit:ToyModel", "points": 14, "shapes": "ab" * 16}
"""What files of earlier releases say: it covers every point that the tables had then."""


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Teaches the toys' table two more roles, as a later release would."""

    def learn() -> None:
        top, block = ToyBackend.groups
        more = (Weight("attn.gate", "down"), Weight("mlp.gate", "up"))
        kept = tuple(e for e in block.entries if getattr(e, "role", "") not in ("mlp.up", "mlp.down"))
        monkeypatch.setattr(ToyBackend, "groups", (top, dataclasses.replace(block, entries=(*kept, *more))))

    return learn


def saved(path: Path, config: ak.AdapterConfig, **model: Any) -> tuple[Path, torch.Tensor]:
    toys.register()
    base: Any = ToyModel(**model)
    adapters = ak.Adapters(base)
    adapters.add("a", config)
    for number, parameter in enumerate(adapters.parameters("a")):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        return adapters.save("a", path / "a.safetensors"), base(toys.ids())


CONFIGS = {
    "named": ak.LoRA(rank=1, targets="attn.{q,v}"),
    "glob": ak.LoRA(rank=1, targets="attn.*"),
    "shared": ak.AdaLoRA(rank=1, targets="attn.*"),
    "ranks": ak.LoRA(rank=1, targets="attn.*", ranks={"attn.q@layer=1": 2}),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("key", CONFIGS)
def test_roles_that_the_table_learns_later_do_not_matter(tmp_path: Path, learnt: Any, key: str, old: bool) -> None:
    path, expected = saved(tmp_path, CONFIGS[key])
    if old:
        forge.header(path, lambda header: header["base"]["toy"].clear() or header["base"]["toy"].update(OLD))
    learnt()
    model: Any = ToyModel()
    adapters = ak.Adapters(model)
    assert len(adapters.points("attn.gate")) == 2
    report = adapters.load(path)
    assert not report.notes
    assert not [point for point in report.points if "gate" in point]
    adapters.activate("a")
    with torch.no_grad():
        assert torch.equal(model(toys.ids()), expected)


def test_the_print_is_of_what_the_adapter_touches(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, ak.LoRA(rank=1, targets="attn.q@layer=1 mlp.up"))
    made_for = forge.native_header(path.read_bytes())["base"]["toy"]
    assert made_for["points"] == 3
    assert made_for["roles"] == {"attn.q": 2, "mlp.up": 2}
    assert made_for["family"] == OLD["family"]


@pytest.mark.parametrize("changes", [{"layers": 1}, {"layers": 3}, {"width": 16}], ids=str)
@pytest.mark.parametrize("targets", ["attn.q@layer=0", "attn.*"])
def test_another_depth_or_width_is_another_base(tmp_path: Path, changes: Any, targets: str) -> None:
    path, _ = saved(tmp_path, ak.LoRA(rank=1, targets=targets), **changes)
    adapters = ak.Adapters(ToyModel())
    with pytest.raises(BaseMismatchError, match="made for another base"):
        adapters.load(path)
    assert not list(adapters)


def test_what_the_adapter_does_not_touch_may_differ(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, ak.LoRA(rank=1, targets="attn.{q,v}"))
    model: Any = ToyModel()
    model.head = torch.nn.Linear(toys.WIDTH, 5)
    for block in model.blocks:
        block.up, block.down = torch.nn.Linear(toys.WIDTH, 5), torch.nn.Linear(5, toys.WIDTH)
    assert not ak.Adapters(model).load(path).notes


def test_an_old_file_for_a_deeper_model_lacks_points(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, ak.LoRA(rank=1, targets="attn.q"), layers=1)
    forge.header(path, lambda header: header["base"]["toy"].clear() or header["base"]["toy"].update(OLD))
    with pytest.raises(MissingKeysError, match=r"attn\.q@toy\.1"):
        ak.Adapters(ToyModel()).load(path)


def test_lenient_loads_note_what_differs(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, ak.LoRA(rank=1, targets="attn.q@layer=0"), layers=3)
    with pytest.warns(UserWarning, match=r"attn\.q 3 there, 2 here"):
        report = ak.Adapters(ToyModel()).load(path, strict=False)
    assert report.points == ["attn.q@toy.0"]
