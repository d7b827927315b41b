"""Roles that a user gives to a model of no known family, and the plug-in that keeps them."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import adapterkit as ak
from adapterkit.backends.generic import GenericBackend, write_plugin
from adapterkit.errors import TargetNotFoundError
from adapterkit.plugins.manager import PluginManager
from tests.backends import vision_checks as checks
from tests.backends import vision_models
from tests.backends.generic_models import Mixed, ids, mixed
from tests.backends.own import own


def run(model: nn.Module) -> Tensor:
    return model(ids())


# --- roles of the user -----------------------------------------------------------------------------------------------

ROLES = {"mlp.up": "blocks.*.widen", "mlp.down": "blocks.*.narrow|blocks.*.shared"}


def test_roles_are_given_by_path() -> None:
    points = ak.points(mixed(), "mlp.*@layer=1", roles=ROLES)
    assert [p.id for p in points if p.path.startswith("blocks")] == [
        "mlp.up@model.blocks.1.widen",
        "mlp.down@model.blocks.1.narrow",
    ]
    plain = sorted(p.path for p in ak.points(mixed()))
    assert sorted(p.path for p in ak.points(mixed(), roles=ROLES)) == plain


def test_roles_act_and_every_later_handle_knows_them(tmp_path: Path) -> None:
    model = mixed()
    adapters = ak.Adapters(model, roles=ROLES)
    adapters.add("a", ak.LoRA(rank=2, targets="path:blocks.0.widen mlp.down"))
    checks.randomise(adapters)
    adapters.freeze()
    y = run(model)
    assert "mlp.up@model.blocks.0.widen" in ak.Adapters(model).points().ids
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), y)
        assert ak.Adapters(copied).points() == adapters.points()
    path = ak.Adapters(model).save("a", tmp_path / "a.safetensors")
    fresh = ak.Adapters(twin := mixed(), roles=ROLES)
    fresh.load(path, "b")
    fresh.activate("b")
    assert torch.equal(run(twin), y)


def test_roles_that_fit_nothing_are_said_when_the_handle_is_made() -> None:
    with pytest.raises(TargetNotFoundError, match=r"blocks\.\*\.widden"):
        ak.Adapters(mixed(), roles={"mlp.up": "blocks.*.widden"})


def test_roles_given_to_a_later_handle_are_its_own() -> None:
    model = mixed()
    ak.Adapters(model, roles=ROLES).add("a", ak.LoRA(rank=2, targets="mlp.up"))
    assert "other@model.blocks.0.widen" in ak.Adapters(model, roles={"other": "blocks.0.widen"}).points().ids
    assert "mlp.up@model.blocks.0.widen" in ak.Adapters(model).points().ids


def test_roles_override_a_familys_and_reach_what_it_ignores() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    model.extra = nn.Linear(8, 8)
    points = ak.points(model, roles={"attn.values": "*.self.value", "extra": "extra"})
    ids = points.ids
    assert "attn.values@language.encoder.layer.0.attention.self.value" in ids
    assert "attn.v@language.0" not in ids
    assert ids[-1] == "extra@language.extra"
    assert "attn.kv@language.0" in ids


def test_in_a_pipeline_roles_may_name_a_component(tmp_path: Path) -> None:
    pipe = vision_models.pipeline(tmp_path)
    points = ak.points(pipe, "mine", roles={"mine": "unet.*.attn1.to_q"})
    assert {p.component for p in points} == {"unet"}
    assert all(p.path.endswith("attn1.to_q") for p in points)


# --- the plug-in -----------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    key = f"{Mixed.__module__.partition('.')[0]}:Mixed"
    home = write_plugin(tmp_path / "plugin", "my_family", [key], ROLES)
    monkeypatch.syspath_prepend(str(home))
    yield importlib.import_module("adapterkit_my_family")
    for name in [name for name in sys.modules if name.startswith("adapterkit_my_family")]:
        del sys.modules[name]


def test_saved_roles_are_a_backend(plugin: Any, manager: PluginManager) -> None:
    manager.register(plugin)
    spec = manager.backend_for(mixed())
    assert spec.name == "my_family"
    backend = spec.load()()
    assert isinstance(backend, GenericBackend)
    assert [p.id for p in backend.points(mixed(), "model")] == own(ak.points(mixed(), roles=ROLES)).ids


def test_a_file_made_with_roles_fits_the_plug_in(plugin: Any, tmp_path: Path) -> None:
    adapters = ak.Adapters(mixed(), roles=ROLES)
    adapters.add("a", ak.LoRA(rank=1, targets="mlp.*"))
    path = adapters.save("a", tmp_path / "a.safetensors")
    manager = ak.get_plugin_manager()
    manager.register(plugin, name="my_family")
    try:
        assert ak.Adapters(mixed()).load(path, "a").points == list(adapters.modules("a"))
    finally:
        manager.unregister(name="my_family")


def test_the_plug_in_imports_no_torch(plugin: Any) -> None:
    source = Path(plugin.__file__).read_text(encoding="utf-8")
    assert "torch" not in source.replace("imports no torch", "")


def test_the_plug_in_can_be_installed(plugin: Any) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(plugin.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "adapterkit-my-family"
    assert project["project"]["entry-points"] == {"adapterkit": {"my_family": "adapterkit_my_family"}}
    assert project["project"]["dependencies"] == ["adapterkit>=0.1,<0.2"]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["adapterkit_my_family"]
