"""Points are found once for a model, and again when its base has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import adapterkit as ak
from adapterkit.errors import TargetNotFoundError
from adapterkit.mapping.structure import Picture, named_base_modules
from adapterkit.testing import toys
from adapterkit.testing.toys import ToyBackend, ToyBlock, ToyModel


@pytest.fixture
def model() -> Any:
    toys.register()
    return ToyModel()


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the backend was asked."""
    asked: list[str] = []
    points = ToyBackend.points

    def counting(self: ToyBackend, model: nn.Module, component: str) -> Any:
        asked.append(component)
        return points(self, model, component)

    monkeypatch.setattr(ToyBackend, "points", counting)
    return asked


def test_verbs_ask_the_backend_once(model: Any, looked: list[str], tmp_path: Any) -> None:
    adapters = ak.Adapters(model)
    before = adapters.points()
    adapters.add("a", ak.LoRA(rank=1))
    adapters.add("b", ak.Bottleneck(reduction=2))
    path = adapters.save("a", tmp_path / "a")
    adapters.load(path, "c")
    model(toys.ids())
    adapters.merge("a")
    adapters.unmerge()
    adapters.remove("a")
    for after in (adapters.points(), ak.Adapters(model).points()):
        assert all(one is other for one, other in zip(after, before, strict=True))
    assert looked == ["toy"]


@pytest.mark.parametrize("format", ["native", "kohya"])
def test_a_save_looks_at_the_model_once(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, format: str
) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(targets="mlp.up", rank=1))
    times: list[object] = []
    shows = Picture.shows

    def counting(self: Picture, roots: Any) -> bool:
        times.append(self)
        return shows(self, roots)

    monkeypatch.setattr(Picture, "shows", counting)
    adapters.save("a", tmp_path / "a.safetensors", format=format)
    assert len(times) == 1


def replace_module(model: Any) -> None:
    model.blocks[0].up = nn.Linear(toys.WIDTH, 24)


def replace_by_its_like(model: Any) -> None:
    model.blocks[1].conv = nn.Conv1d(toys.WIDTH, toys.WIDTH, 5, padding=2, groups=2)


def add_a_layer(model: Any) -> None:
    model.blocks.append(ToyBlock())


def remove_a_layer(model: Any) -> None:
    del model.blocks[1]


def resize_in_place(model: Any) -> None:
    """As transformers' resize_token_embeddings does."""
    model.embed.weight.data = torch.zeros(19, toys.WIDTH)
    model.embed.num_embeddings = 19


def change_heads(model: Any) -> None:
    model.blocks[0].attn.heads = 4


def change_stride(model: Any) -> None:
    model.blocks[0].conv.stride = (2,)


def drop_a_bias(model: Any) -> None:
    model.blocks[0].up.bias = None


def parametrize(model: Any) -> None:
    weight_norm(model.blocks[0].up)


CHANGES = [
    replace_module,
    replace_by_its_like,
    add_a_layer,
    remove_a_layer,
    resize_in_place,
    change_heads,
    change_stride,
    drop_a_bias,
    parametrize,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_the_next_verb_sees_a_changed_base(model: Any, change: Callable[[Any], None], adapted: bool) -> None:
    adapters = ak.Adapters(model)
    before = adapters.points()
    if adapted:
        adapters.add("a", ak.LoRA(rank=1, targets="attn.o@layer=0"))
    change(model)
    fresh = copy.deepcopy(model) if not adapted else model
    assert adapters.points() == ak.points(fresh)
    if change is not parametrize:
        assert adapters.points() != before


def test_an_added_layer_can_be_adapted_and_a_removed_one_cannot(model: Any) -> None:
    adapters = ak.Adapters(model)
    with pytest.raises(TargetNotFoundError):
        adapters.add("a", ak.LoRA(rank=1, targets="attn.q@layer=2"))
    model.blocks.append(ToyBlock())
    adapters.add("a", ak.LoRA(rank=1, targets="attn.q@layer=2"))
    adapters.remove("a")
    del model.blocks[2]
    with pytest.raises(TargetNotFoundError):
        adapters.add("a", ak.LoRA(rank=1, targets="attn.q@layer=2"))


def test_adapters_change_nothing_of_the_picture(model: Any) -> None:
    picture = Picture([model])
    names = [name for name, _ in model.named_modules()]
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1))
    adapters.add("b", ak.Prefix(length=1))
    assert picture.shows([model])
    assert [name for name, _ in named_base_modules(model)] == names
    adapters.detach()
    assert picture.shows([model])


def test_a_shared_module_is_given_once_or_under_each_name(model: Any) -> None:
    for repeated in (False, True):
        expected = list(model.named_modules(remove_duplicate=not repeated))
        assert list(named_base_modules(model, repeated=repeated)) == expected


def test_the_picture_keeps_no_module_alive(model: Any) -> None:
    picture = Picture([model])
    old = weakref.ref(model.norm)
    model.norm = nn.LayerNorm(toys.WIDTH)
    gc.collect()
    assert old() is None
    assert not picture.shows([model])


def test_copies_find_their_own_points(model: Any, looked: list[str]) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1))
    twin, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (twin, stored):
        one.blocks.append(ToyBlock())
        assert len(ak.Adapters(one).points("attn.q")) == 3
    assert len(adapters.points("attn.q")) == 2
    assert looked == ["toy"] * 3
