"""Specs: what they refuse, and what loading their targets says when it fails."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from adapterkit.errors import ConfigError, MissingDependencyError, PluginLoadError
from adapterkit.points import KINDS
from adapterkit.specs import POINT_KINDS, AdapterSpec, BackendSpec, CommandSpec, FormatSpec, LayerSpec, Origin, TaskSpec

ORIGIN = Origin("zoo", "adapterkit-zoo", "1.2")


@pytest.mark.parametrize("name", ["", "LoRA", "1a", "a-b", "a b", "a.b", "é", "a\n", None, 3])
def test_names_are_lower_case_words(name: object) -> None:
    with pytest.raises(ConfigError, match=r"name .* does not match"):
        FormatSpec(name, "a:b")


def test_tasks_and_commands_may_hold_dashes() -> None:
    assert TaskSpec("causal-lm", "a:b").name == "causal-lm"
    assert CommandSpec("dry-run", "a:b").name == "dry-run"
    with pytest.raises(ConfigError, match="name '-a'"):
        TaskSpec("-a", "a:b")


@pytest.mark.parametrize("target", ["", "a", "a.b", ":b", "a:", "a:b:c", "a b:c", "a..b:c", "../a:b", None])
def test_targets_are_module_and_attribute(target: object) -> None:
    with pytest.raises(ConfigError, match=r"target .* is not of the form"):
        FormatSpec("x", target)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BackendSpec("No", "no", models=("timm.VisionTransformer", "timm:ok"))
    assert [problem.split()[0] for problem in caught.value.problems] == ["name", "target", "models"]
    assert "timm.VisionTransformer" in str(caught.value)
    assert "timm:ok" not in str(caught.value)


def test_kinds_must_be_kinds() -> None:
    assert AdapterSpec("x", "a:b", kinds=["output", "weight"]).kinds == {"output", "weight"}
    for kinds in ({"weights"}, set(), "weight"):
        with pytest.raises(ConfigError, match=r"kinds .* attention, norm, output, tokens, weight"):
            AdapterSpec("x", "a:b", kinds=kinds)


@pytest.mark.parametrize("models", [(), "timm:VisionTransformer"])
def test_models_must_be_a_non_empty_sequence(models: object) -> None:
    with pytest.raises(ConfigError, match="non-empty sequence"):
        BackendSpec("x", "a:b", models=models)


@pytest.mark.parametrize("classes", [(), "lib:Int8Linear", ("lib.layers:Int8Linear",), ("Int8Linear",)])
def test_classes_of_layers_are_checked_like_those_of_models(classes: object) -> None:
    with pytest.raises(ConfigError, match=r"invalid LayerSpec 'x': classes (must be|holds)"):
        LayerSpec("x", "a:b", classes=classes)
    spec = LayerSpec("x", "a:b", classes=["lib:Int8Linear"], extra="int8")
    assert (spec.classes, spec.extra_name, spec.kind) == (("lib:Int8Linear",), "int8", "layer")


@pytest.mark.parametrize("models", ["torch.nn:Module", ("torch.nn:Module",)])
def test_models_are_named_by_their_top_package(models: object) -> None:
    with pytest.raises(ConfigError, match="write 'torch:Module', whatever module the class is in"):
        BackendSpec("x", "a:b", models=models)


def test_specs_are_frozen_and_compare_without_their_origin() -> None:
    spec = CommandSpec("x", "collections:OrderedDict", origin=ORIGIN)
    assert spec == CommandSpec("x", "collections:OrderedDict")
    with pytest.raises(AttributeError):
        spec.name = "y"


def test_load_imports_the_target_and_follows_dots() -> None:
    assert CommandSpec("x", "collections:OrderedDict").load() is OrderedDict
    assert CommandSpec("x", "collections:OrderedDict.fromkeys").load()("ab") == OrderedDict(a=None, b=None)


def test_a_missing_attribute_names_the_near_match() -> None:
    with pytest.raises(PluginLoadError, match=r"no attribute 'OrderedDct'.*'OrderedDict'") as caught:
        CommandSpec("x", "collections:OrderedDct", origin=ORIGIN).load()
    assert caught.value.plugin == "zoo"
    assert "adapterkit-zoo 1.2" in str(caught.value)


def test_a_missing_module_of_the_plugin_itself_is_its_own_fault() -> None:
    with pytest.raises(PluginLoadError, match=r"there is no module 'collections.nowhere'"):
        CommandSpec("x", "collections.nowhere:a", origin=ORIGIN).load()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "zoo_module.py").write_text(request.param)
    sys.modules.pop("zoo_module", None)
    return "zoo_module:thing"


@pytest.mark.parametrize("module", ["import no_such_library.part"], indirect=True)
def test_a_missing_dependency_ends_in_the_command_that_installs_it(module: str) -> None:
    with_extra = BackendSpec("x", module, models=("a:B",), extra="zebra", origin=ORIGIN)
    with pytest.raises(MissingDependencyError, match=r"pip install 'adapterkit-zoo\[zebra\]'$"):
        with_extra.load()
    with pytest.raises(MissingDependencyError, match=r"needs 'no_such_library'.*pip install no_such_library$"):
        CommandSpec("x", module, origin=ORIGIN).load()


@pytest.mark.parametrize("module", ["raise RuntimeError('mismatched binary')", "from os import nothing"], indirect=True)
def test_any_other_failure_is_wrapped_with_its_cause(module: str) -> None:
    with pytest.raises(
        PluginLoadError, match=r"command 'x' \(zoo_module:thing\) from adapterkit-zoo 1.2 failed"
    ) as caught:
        CommandSpec("x", module, origin=ORIGIN).load()
    assert isinstance(caught.value.__cause__, (RuntimeError, ImportError))


def test_kinds_are_those_of_the_points() -> None:
    assert set(KINDS) == POINT_KINDS


def test_nothing_is_prepared_for_a_module_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for torchvision takes a millisecond, and a load asks for a hundred specs."""
    spec = FormatSpec("native", "adapterkit.formats.native:NativeFormat")
    spec.load()
    monkeypatch.setattr(FormatSpec, "prepare", lambda self: pytest.fail("prepared again"))
    spec.load()
