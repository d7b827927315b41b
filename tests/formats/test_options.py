"""What load and save can be told, what goes along with an adapter, and what a load says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import adapterkit as ak
from adapterkit import errors
from adapterkit.checkpoint import Checkpoint, Format, ReadOptions, ReadReport, WriteOptions, WriteReport
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.source import Source
from adapterkit.specs import FormatSpec
from tests.formats.reading import read

SAID = {"trigger": 'ünïcode, "quotes" and \n lines', "": "empty", "steps": "10"}


def test_metadata_goes_along(adapters: ak.Adapters, tmp_path: Path) -> None:
    assert adapters.metadata("good") == {}
    path = adapters.save("good", tmp_path / "a.safetensors", metadata=SAID)
    assert adapters.metadata("good") == {}
    report = adapters.load(path, "again")
    assert report.metadata == adapters.metadata("again") == SAID
    assert adapters.save("again", tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    other = adapters.save("again", tmp_path / "c.safetensors", metadata={"steps": "20", "more": "1"})
    assert read(other).metadata == {**SAID, "steps": "20", "more": "1"}
    adapters.metadata("again")["steps"] = "30"
    assert adapters.metadata("again") == SAID
    bundle = adapters.save(["good", "again"], tmp_path / "d.safetensors", metadata={"who": "me"})
    adapters.detach()
    reports = adapters.load_all(bundle)
    assert {name: one.metadata for name, one in reports.items()} == {
        "good": {"who": "me"},
        "again": {**SAID, "who": "me"},
    }


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, ["a"], "a"])
def test_metadata_is_text_by_name(adapters: ak.Adapters, tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(errors.ConfigError, match="metadata must map names to strings"):
        adapters.save("good", tmp_path / "a", metadata=metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_choice(adapters: ak.Adapters, tmp_path: Path, dtype: torch.dtype) -> None:
    before = adapters.state_dict("good")
    path = adapters.save("good", tmp_path / "a", dtype=dtype)
    assert {entry.dtype for entry in Source.of(path).entries.values()} == {dtype}
    found = read(path).tensors
    for key, tensor in before.items():
        point, _, name = key.partition("/")
        assert torch.equal(found[point][name], tensor.to(dtype))
        assert adapters.state_dict("good")[key].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "half", torch.complex64])
def test_a_dtype_that_holds_no_weights(adapters: ak.Adapters, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(errors.ConfigError, match="dtype must be a floating-point"):
        adapters.save("good", tmp_path / "a", dtype=dtype)


def test_an_option_that_the_format_has_not(adapters: ak.Adapters, file: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"format 'native'.*unknown option 'aproximate'.*'approximate'"):
        adapters.save("good", tmp_path / "a", aproximate=True)
    with pytest.raises(errors.ConfigError, match="unknown option 'prefix'"):
        adapters.load(file, "new", prefix="unet")
    with pytest.raises(errors.ConfigError, match="unknown option 'prefix'"):
        adapters.load_all(file, prefix="unet")
    assert not list(tmp_path.glob("a"))


@dataclass(frozen=True)
class Reading(ReadOptions):
    scale: float = 1.0


@dataclass(frozen=True)
class Writing(WriteOptions):
    note: str = ""


class Zoo(NativeFormat):
    """Reads a native file as if it were foreign, with options of its own."""

    read_options: ClassVar[type[ReadOptions]] = Reading
    write_options: ClassVar[type[WriteOptions]] = Writing
    report: ClassVar[ReadReport] = ReadReport(matched=["x"])

    def recognises(self, source: Source) -> bool:
        return False

    def read(self, source: Source, points: Any, options: Any) -> tuple[dict[str, Checkpoint], ReadReport]:
        found, _ = super().read(source, points, options)
        for tensor in (t for one in found.values() for own in one.tensors.values() for t in own.values()):
            tensor.mul_(options.scale)
        return found, self.report

    def write(self, checkpoints: Mapping[str, Checkpoint], target: Path, points: Any, options: Any) -> WriteReport:
        super().write(checkpoints, target, points, options)
        return WriteReport([options.note] if options.note else [])


class NoOptions(Zoo):
    read_options = dict  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _zoo() -> Iterator[None]:
    manager, plugin = ak.get_plugin_manager(), ModuleType("zoo_options")
    specs = [FormatSpec(name, f"{__name__}:{cls}") for name, cls in (("zoo", "Zoo"), ("no_options", "NoOptions"))]
    hook = ak.hookimpl(lambda: specs, specname="adapterkit_register_formats")
    plugin.adapterkit_register_formats = hook  # type: ignore[attr-defined]
    manager.register(plugin, name="zoo_options")
    yield
    manager.unregister(name="zoo_options")


def test_a_format_gets_its_own_options(adapters: ak.Adapters, file: Path, tmp_path: Path) -> None:
    adapters.load(file, "twice", format="zoo", scale=2.0)
    for key, tensor in adapters.state_dict("good").items():
        assert torch.equal(adapters.state_dict("twice")[key], 2 * tensor)
    with pytest.warns(UserWarning, match="half of it"):
        adapters.save("good", tmp_path / "a", format="zoo", note="half of it", dtype=torch.float16)
    assert {entry.dtype for entry in Source.of(tmp_path / "a").entries.values()} == {torch.float16}
    with pytest.raises(errors.PluginError, match="is no dataclass of ReadOptions"):
        adapters.load(file, "new", format="no_options")


REPORT = ReadReport(
    matched=["a", "b"], unmatched=["te.c"], notes=["alpha was missing"], tool="trainer", version="1.2", base="SD 1.5"
)


def test_a_load_says_what_was_found(adapters: ak.Adapters, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Zoo, "report", REPORT)
    with pytest.raises(errors.UnexpectedKeysError, match=r"1 keys belong to no point.*: te\.c; strict=False"):
        adapters.load(file, "new", format="zoo")
    report = adapters.load(file, "new", format="zoo", strict=False)
    assert (report.read.format, report.read.unmatched) == ("zoo", ["te.c"])
    told = str(report)
    for word in ("alpha was missing", "written by trainer 1.2", "from zoo", "te.c", "SD 1.5"):
        assert word in told
    values = json.loads(json.dumps(report.to_dict()))
    assert values["read"]["tool"] == "trainer"
    assert values["read"]["matched"] == ["a", "b"]


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_always_an_error(
    adapters: ak.Adapters, file: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(Zoo, "report", ReadReport(unmatched=["te.c"], left_over=["odd"]))
    with pytest.raises(errors.MissingKeysError, match=r"nothing in it fits.*te\.c.*unknown to the format: odd"):
        adapters.load(file, "new", format="zoo", strict=strict)


def test_a_native_file_says_who_wrote_it(adapters: ak.Adapters, file: Path) -> None:
    report = adapters.load(file, "again")
    assert (report.read.format, report.read.tool, report.read.version) == ("native", "adapterkit", ak.__version__)
    assert len(report.read.matched) == len(Source.of(file).entries)
    assert [*report.read.unmatched, *report.read.left_over] == []


def test_formats_need_no_more_than_their_methods() -> None:
    assert Format.read_options is ReadOptions
    assert Format.write_options is WriteOptions
