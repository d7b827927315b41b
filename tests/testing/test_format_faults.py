"""Each check of a format finds a format that is broken in what the check is about."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint, Format
from adapterkit.errors import CheckpointError, CorruptFileError, UnsupportedFileError
from adapterkit.formats.native import NativeFormat
from adapterkit.specs import FormatSpec
from adapterkit.testing import check_format, limits
from adapterkit.testing.formats import FormatConformance

Broken: type[Format] = NativeFormat
"""The format under test, where its registered name leads."""


class Loses(NativeFormat):
    def read(self, path: Path, points: Any) -> Checkpoint:
        checkpoint = super().read(path, points)
        for own in checkpoint.tensors.values():
            for tensor in own.values():
                tensor.mul_(0.99)
        return checkpoint


class ByName(NativeFormat):
    def recognises(self, path: Path) -> bool:
        return path.suffix == ".safetensors"


class Crashes(NativeFormat):
    def read(self, path: Path, points: Any) -> Checkpoint:
        try:
            return super().read(path, points)
        except CorruptFileError as error:
            raise KeyError("header") from error


class Hangs(NativeFormat):
    def read(self, path: Path, points: Any) -> Checkpoint:
        try:
            return super().read(path, points)
        except CorruptFileError:
            time.sleep(1)
            raise


class ReadsAnything(NativeFormat):
    def read(self, path: Path, points: Any) -> Checkpoint:
        try:
            return super().read(path, points)
        except UnsupportedFileError:
            return Checkpoint("lora", {}, {})


class DiagnosesBadly(NativeFormat):
    def diagnose(self, path: Path) -> None:
        raise ValueError("no such file of mine")


class Mutates(NativeFormat):
    def write(self, checkpoint: Checkpoint, path: Path, points: Any) -> None:
        super().write(checkpoint, path, points)
        next(iter(next(iter(checkpoint.tensors.values())).values())).zero_()


class Litters(NativeFormat):
    def write(self, checkpoint: Checkpoint, path: Path, points: Any) -> None:
        super().write(checkpoint, path, points)
        path.with_suffix(".tmp").touch()


class LastOfMany(NativeFormat):
    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Any) -> None:
        self.write(list(checkpoints.values())[-1], path, points)


class Swaps(NativeFormat):
    def read_many(self, path: Path, points: Any) -> dict[str, Checkpoint]:
        found = super().read_many(path, points)
        return dict(zip(found, reversed(found.values()), strict=True))


class RefusesLate(NativeFormat):
    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Any) -> None:
        super().write_many(checkpoints, path, points)
        raise CheckpointError("two are too many", path)


class Slow(NativeFormat):
    def recognises(self, path: Path) -> bool:
        time.sleep(0.5)
        return super().recognises(path)


class Unrecognised(NativeFormat):
    """Its files are of no format that is known, and of none that it knows itself."""

    def recognises(self, path: Path) -> bool:
        return False

    def write(self, checkpoint: Checkpoint, path: Path, points: Any) -> None:
        super().write(checkpoint, path, points)
        path.write_bytes(b"mine" + path.read_bytes())


FAULTS: list[tuple[str, type[Format], str]] = [
    ("round_trip", Loses, "they must be the same bit for bit"),
    ("several_in_one_file", LastOfMany, "came back instead of first, Second-2"),
    ("several_in_one_file", Swaps, "first of two, .* they must be the same bit for bit"),
    ("several_in_one_file", RefusesLate, "a refused file of two is there"),
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

    def write(self, checkpoint: Checkpoint, path: Path, points: Any) -> None:
        halved = {key: {n: _halved(t) for n, t in own.items()} for key, own in checkpoint.tensors.items()}
        super().write(dataclasses.replace(checkpoint, tensors=halved), path, points)

    def write_many(self, checkpoints: Mapping[str, Checkpoint], path: Path, points: Any) -> None:
        raise CheckpointError("one alone", path)


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
