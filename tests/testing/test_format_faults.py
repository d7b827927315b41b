"""Each check of a format finds a format that is broken in what the check is about."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint, Format, ReadReport, WriteOptions, single
from adapterkit.errors import CheckpointError, CorruptFileError, UnsupportedFileError
from adapterkit.formats.native import NativeFormat
from adapterkit.formats.source import Source
from adapterkit.specs import FormatSpec
from adapterkit.testing import check_format, limits
from adapterkit.testing.formats import FormatConformance

Many = Mapping[str, Checkpoint]
Read = tuple[dict[str, Checkpoint], ReadReport]

Broken: type[Format] = NativeFormat
"""The format under test, where its registered name leads."""


class Loses(NativeFormat):
    def read(self, source: Source, points: Any, options: Any) -> Read:
        found, report = super().read(source, points, options)
        for tensor in (t for one in found.values() for own in one.tensors.values() for t in own.values()):
            tensor.mul_(0.99)
        return found, report


class ByName(NativeFormat):
    def recognises(self, source: Source) -> bool:
        return source.path is not None and source.path.suffix == ".safetensors"


class Crashes(NativeFormat):
    def read(self, source: Source, points: Any, options: Any) -> Read:
        try:
            return super().read(source, points, options)
        except CorruptFileError as error:
            raise KeyError("header") from error


class Hangs(NativeFormat):
    def read(self, source: Source, points: Any, options: Any) -> Read:
        try:
            return super().read(source, points, options)
        except CorruptFileError:
            time.sleep(1)
            raise


class ReadsAnything(NativeFormat):
    def read(self, source: Source, points: Any, options: Any) -> Read:
        try:
            return super().read(source, points, options)
        except UnsupportedFileError:
            return {"": Checkpoint.of("lora", {}, {})}, ReadReport()


class DiagnosesBadly(NativeFormat):
    def diagnose(self, source: Source) -> None:
        raise ValueError("no such file of mine")


class Mutates(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write(checkpoints, target, points, options)
        tensors = next(iter(checkpoints.values())).parts[0].tensors
        next(iter(next(iter(tensors.values())).values())).zero_()


class Litters(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write(checkpoints, target, points, options)
        target.with_suffix(".tmp").touch()


class LastOfMany(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write({"": list(checkpoints.values())[-1]}, target, points, options)


class Swaps(NativeFormat):
    def read(self, source: Source, points: Any, options: Any) -> Read:
        found, report = super().read(source, points, options)
        return dict(zip(found, reversed(found.values()), strict=True)), report


class RefusesLate(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write(checkpoints, target, points, options)
        if len(checkpoints) > 1:
            raise CheckpointError("two are too many", target)


class FirstType(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        firsts = {name: one.replace(parts=one.parts[:1]) for name, one in checkpoints.items()}
        super().write(firsts, target, points, options)


class Forgets(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write({n: one.replace(metadata={}) for n, one in checkpoints.items()}, target, points, options)


class AnyDtype(NativeFormat):
    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write(checkpoints, target, points, WriteOptions())


class FilesAlone(NativeFormat):
    def recognises(self, source: Source) -> bool:
        return source.path is not None and super().recognises(source)


class Slow(NativeFormat):
    def recognises(self, source: Source) -> bool:
        time.sleep(0.5)
        return super().recognises(source)


class Unrecognised(NativeFormat):
    """Its files are of no format that is known, and of none that it knows itself."""

    def recognises(self, source: Source) -> bool:
        return False

    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        super().write(checkpoints, target, points, options)
        target.write_bytes(b"mine" + target.read_bytes())


FAULTS: list[tuple[str, type[Format], str]] = [
    ("round_trip", Loses, "they must be the same bit for bit"),
    ("several_in_one_file", LastOfMany, "came back instead of first, Second-2"),
    ("several_in_one_file", Swaps, "first of two, .* they must be the same bit for bit"),
    ("several_in_one_file", RefusesLate, "a refused file of two is there"),
    ("several_types", FirstType, "of a file of two types are lost"),
    ("metadata", Forgets, "metadata came back as"),
    ("dtype", AnyDtype, "in a file of bfloat16"),
    ("tensors_in_memory", FilesAlone, "in memory are not recognised"),
    ("content_tells_the_format", ByName, "is not recognised"),
    ("foreign_files_are_refused", ReadsAnything, "json was read|empty was read|tensors was read"),
    ("foreign_files_are_refused", DiagnosesBadly, "no such file of mine"),
    ("damaged_files_are_errors", Crashes, "gives KeyError|header"),
    ("damaged_files_are_errors", Hangs, r"read\(file\) takes longer than 0.2 s"),
    ("recognition_is_quick", Slow, r"recognises\(file\) takes longer than 0.2 s"),
    ("the_caller_keeps_its_tensors", Mutates, "they must be the same bit for bit"),
    ("writing_is_atomic", Litters, "writing left more than its file"),
    ("through_the_handle", Unrecognised, "is cut short or no safetensors file"),
]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Whatever is `Broken` now, under a name."""

    @ak.hookimpl
    def adapterkit_register_formats() -> list[FormatSpec]:
        return [FormatSpec("kit_broken", f"{__name__}:Broken", summary="broken")]

    plugin = type("Plugin", (), {"adapterkit_register_formats": staticmethod(adapterkit_register_formats)})()
    ak.get_plugin_manager().register(plugin, name="kit_broken_format")
    yield
    ak.get_plugin_manager().unregister(name="kit_broken_format")


def only(check: str, format: type[Format]) -> Callable[[], None]:
    """One check on a format."""
    return getattr(type("Case", (FormatConformance,), {"format": format})(), f"test_{check}")


@pytest.mark.parametrize(("check", "format", "message"), FAULTS)
def test_each_fault_is_found(check: str, format: type[Format], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Broken", format)
    if format in (Hangs, Slow):
        monkeypatch.setattr(limits, "LONG" if format is Hangs else "QUICK", 0.2)
    with pytest.raises(Exception, match=message):
        only(check, format)()


def test_every_check_has_a_fault() -> None:
    checks = {name.removeprefix("test_") for name in dir(FormatConformance) if name.startswith("test_")}
    assert {check for check, *_ in FAULTS} == checks


def test_a_right_format_passes() -> None:
    report = check_format(NativeFormat)
    assert report, str(report)


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


class Half(NativeFormat):
    """Writes half precision, and says how near that is."""

    configs = (ak.LoRA(rank=2), ak.LoRA(rank=3))
    tolerance = 0.05

    def write(self, checkpoints: Many, target: Path, points: Any, options: Any) -> None:
        checkpoint = single(checkpoints, target)
        halved = {key: {n: _halved(t) for n, t in own.items()} for key, own in checkpoint.tensors.items()}
        super().write({"": checkpoint.replace(tensors=halved)}, target, points, options)


class Exact(Half):
    tolerance = 0.0


def test_a_format_says_of_itself_how_exact_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Broken", Half)
    assert check_format(Half), str(check_format(Half))
    assert {result.name for result in check_format(Exact).failures} >= {"round_trip"}


def test_a_call_that_ends_gives_what_it_gives() -> None:
    assert limits.within(1, "a call", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        limits.within(1, "a call", lambda: 1 / 0)
