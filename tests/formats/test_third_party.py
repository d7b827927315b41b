"""Formats that strangers have written: a broken one is named, and never keeps another from reading its files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import adapterkit as ak
from adapterkit import errors
from adapterkit.checkpoint import Checkpoint, Format, ReadReport
from adapterkit.cli.main import main
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.registry import find_format
from adapterkit.formats.source import Source
from adapterkit.specs import AdapterSpec, FormatSpec
from tests.formats.spoiling import Refusal

Provide = Callable[..., None]
GOOD = b"a plain file"


class Plain(Format):
    """Files that begin with GOOD; what they hold is `held`."""

    held: Any = None

    def recognises(self, source: Source) -> bool:
        return Path(str(source.where)).read_bytes().startswith(GOOD)

    def read(self, source: Source, points: object, options: object) -> Any:
        return {"": self.held}, ReadReport()

    def write(self, checkpoints: object, target: Path, points: object, options: object) -> None:
        raise KeyError("no such key")


class Raising(Plain):
    def recognises(self, source: Source) -> bool:
        raise KeyError("boom")


class Greedy(Plain):
    def recognises(self, source: Source) -> bool:
        return True


class Incomplete(Format):
    """Lacks its abstract methods."""


no_format = "not a class"


@pytest.fixture
def provide() -> Iterator[Provide]:
    """Registers formats, each as a plug-in of its own."""
    manager, names = ak.get_plugin_manager(), []

    def register(name: str, target: str) -> None:
        spec = FormatSpec(name, target if ":" in target else f"{__name__}:{target}")
        plugin: Any = ModuleType(f"zoo_{name}")
        plugin.adapterkit_register_formats = ak.hookimpl(lambda: [spec], specname="adapterkit_register_formats")
        names.append(manager.register(plugin, name=plugin.__name__))

    yield register
    for name in names:
        manager.unregister(name=name)


BROKEN = {
    "a module that it needs": ("no_such_library.formats:Any", "no module 'no_such_library'"),
    "its class": (f"{__name__}:Plan", "has no attribute 'Plan'. Did you mean 'Plain'"),
    "a class": ("no_format", "expected a subclass of adapterkit.checkpoint.Format"),
    "its methods": ("Incomplete", "raised TypeError: Can't instantiate abstract class"),
    "an answer": ("Raising", "recognises raised KeyError: 'boom'"),
}


@pytest.mark.parametrize("lacks", BROKEN)
def test_a_broken_one_is_named_and_does_not_stop_the_others(
    lacks: str, provide: Provide, adapters: ak.Adapters, file: Path, refused: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    target, reason = BROKEN[lacks]
    provide("broken", target)
    adapters.load(file, "again")
    adapters.remove("again")
    assert not caplog.records  # nobody has asked for it
    file.write_bytes(b"of nobody's format")
    message = str(refused(file, errors.UnsupportedFileError))
    assert "no safetensors file" in message
    assert "could not be asked" in message
    assert "zoo_broken" in message
    assert reason in message
    provide("plain", "Plain")
    file.write_bytes(GOOD)
    with caplog.at_level(logging.WARNING):
        assert find_format(Source.of(file)).spec.name == "plain"
    [record] = caplog.records
    assert "zoo_broken" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("lacks", BROKEN)
def test_a_broken_one_that_is_asked_for_is_an_error(
    lacks: str, provide: Provide, adapters: ak.Adapters, file: Path
) -> None:
    target, reason = BROKEN[lacks]
    provide("broken", target)
    with pytest.raises(errors.PluginError) as caught:
        adapters.load(file, "new", format="broken")
    assert caught.value.plugin == "zoo_broken"
    assert lacks == "an answer" or reason in str(caught.value)
    assert list(adapters) == ["good"]


def test_adapterkits_own_files_are_its_own(provide: Provide, adapters: ak.Adapters, file: Path) -> None:
    provide("greedy", "Greedy")
    assert find_format(Source.of(file)).spec.name == "native"
    assert adapters.load(file, "again").type == "lora"


def test_several_that_recognise_a_file_are_named(provide: Provide, file: Path, refused: Refusal) -> None:
    provide("plain", "Plain")
    provide("greedy", "Greedy")
    file.write_bytes(GOOD)
    message = str(refused(file, errors.AmbiguousFormatError))
    assert "format 'plain'" in message
    assert "format 'greedy'" in message
    assert "format='plain'" in message
    assert find_format(Source.of(file), "plain").spec.name == "plain"


def checkpoint(**changes: Any) -> Checkpoint:
    return Checkpoint.of("lora", {}, {"attn.o@toy.0": {"A": torch.zeros(2, 2)}}).replace(**changes)


RETURNED = {
    "nothing": (None, "returned None; expected a Checkpoint"),
    "a dict": ({"type": "lora"}, "returned dict; expected a Checkpoint"),
    "arrays": (checkpoint(tensors={"p": {"A": np.zeros(2)}}), "tensors['p']['A'] is ndarray; expected a torch.Tensor"),
    "flat tensors": (checkpoint(tensors={"p/A": torch.zeros(2)}), "tensors['p/A'] is Tensor; expected a dict"),
    "a list of tensors": (checkpoint(tensors=[]), "tensors is list; expected a dict"),
    "no type": (checkpoint(type=None), "type is None; expected a str"),
    "a config in JSON": (checkpoint(config="{}"), "config is str '{}'; expected a dict"),
    "a base without parts": (checkpoint(base={"toy": "x"}), "base['toy'] is str 'x'; expected a dict"),
}


@pytest.mark.parametrize("what", RETURNED)
def test_what_it_returns_is_checked(
    what: str, provide: Provide, file: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide("plain", "Plain")
    file.write_bytes(GOOD)
    value, reason = RETURNED[what]
    monkeypatch.setattr(Plain, "held", value)
    error = refused(file, errors.BrokenFormatError)
    assert reason in str(error)
    assert error.plugin == "zoo_plain"  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(error, errors.PluginError)


@pytest.mark.parametrize("found", [None, {}, {1: checkpoint()}, [checkpoint()], {"a": None}])
def test_what_it_returns_of_several_is_checked(
    found: Any, provide: Provide, adapters: ak.Adapters, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide("plain", "Plain")
    file.write_bytes(GOOD)
    monkeypatch.setattr(Plain, "read", lambda self, source, points, options: (found, ReadReport()))
    if found == {}:  # nothing in it is of the model
        with pytest.raises(errors.MissingKeysError, match="nothing in it fits the model"):
            adapters.load_all(file)
        return
    with pytest.raises(errors.BrokenFormatError, match=r"zoo_plain.*read returned.*expected a"):
        adapters.load_all(file)


def test_what_it_raises_names_it(
    provide: Provide, file: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide("plain", "Plain")
    file.write_bytes(GOOD)
    monkeypatch.setattr(Plain, "read", lambda self, source, points, options: {}["weights"])
    error = refused(file, errors.BrokenFormatError)
    assert "'plain'" in str(error)
    assert "read raised KeyError: 'weights'" in str(error)
    assert isinstance(error.__cause__, KeyError)


def test_what_it_raises_while_writing_names_it(provide: Provide, adapters: ak.Adapters, tmp_path: Path) -> None:
    provide("plain", "Plain")
    with pytest.raises(errors.BrokenFormatError, match="write raised KeyError: 'no such key'"):
        adapters.save("good", tmp_path / "a", format="plain")
    provide("broken", "no_format")
    with pytest.raises(errors.PluginError, match="expected a subclass of"):
        adapters.save("good", tmp_path / "a", format="broken")


def test_a_type_that_is_no_adapter_is_named(adapters: ak.Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, plugin = ak.get_plugin_manager(), ModuleType("zoo_type")
    spec = AdapterSpec("strange", f"{__name__}:no_format", kinds={"weight"})
    hook = ak.hookimpl(lambda: [spec], specname="adapterkit_register_adapters")
    plugin.adapterkit_register_adapters = hook  # type: ignore[attr-defined]
    manager.register(plugin, name="zoo_type")
    try:
        with pytest.raises(errors.UnknownAdapterTypeError, match=r"broken: .*zoo_type.*expected a subclass of"):
            adapters.install("new", Checkpoint.of("strange", {}, {}))
    finally:
        manager.unregister(name="zoo_type")


def test_a_folder_is_no_file(
    provide: Provide, adapters: ak.Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.NotRegularFileError, match="is a folder"):
        adapters.load(tmp_path, "a")
    provide("plain", "Plain")
    source = Source.of(tmp_path)
    with pytest.raises(errors.NotRegularFileError, match=r"is a folder.*plain.* expects a file"):
        find_format(source, "plain").recognises(source)
    with pytest.raises(errors.CheckpointError, match="is a folder"):
        adapters.load(tmp_path, "a")


@pytest.mark.parametrize("text", ['{"r": 8, "lora_alpha": 16}', "{}", "[1, 2]", '\n{\n  "peft_type": "LORA"\n}'])
def test_a_json_file_is_called_so(text: str, file: Path, refused: Refusal) -> None:
    file.write_text(text)
    assert "is a JSON file" in str(refused(file, errors.UnsupportedFileError))


def test_a_missing_file_has_near_matches(adapters: ak.Adapters, file: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=r"no such file. Did you mean 'bad.safetensors'"):
        adapters.load(file.with_name("bed.safetensors"))


def test_inspect_asks_as_load_does(provide: Provide, file: Path) -> None:
    provide("broken", "no_such_library:Any")
    provide("greedy", "Greedy")
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 0, result.output
    assert NativeFormat().recognises(Source.of(file))
    file.write_bytes(b"of nobody's format")
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 1
    assert "zoo_greedy" in result.stderr
