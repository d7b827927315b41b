"""The checks of a file format."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint, Format, ReadReport
from adapterkit.errors import AdapterKitError, CheckpointError
from adapterkit.formats.source import Readable, Source
from adapterkit.points import Points
from adapterkit.testing import families
from adapterkit.testing.format_files import (
    assert_equal,
    assert_parts,
    copied,
    dtypes_in,
    example_of,
    foreign_files,
    in_halves,
)
from adapterkit.testing.limits import Limited
from adapterkit.testing.models import EXAMPLES
from adapterkit.testing.reports import CheckReport, run_checks
from adapterkit.testing.subject import assert_close, assert_same, expecting, move, skip

_FLIPS, _LARGE = 200, 2**28
_SAID = ("configs", "tolerance", "checks_itself")


class FormatConformance:
    """Every check of a format. Derive from it and say what it is about.

        class TestMine(FormatConformance):
            format = MyFormat
            configs = (ak.LoRA(rank=2),)

    Attributes:
        format: The class.
        configs: Adapters that the format can express; each is tried on the tiny models where it fits.
        tolerance: Of the effect after a round trip, relative; 0 means bit for bit, in every tensor and the config.
        checks_itself: Whether a file with a changed byte must be refused; otherwise other values may be read.

    `check_format` and `adapterkit plugins check` take the last three from the format's own class attributes of these
    names, where it has them.
    """

    format: ClassVar[type[Format]]
    configs: ClassVar[tuple[ak.AdapterConfig, ...]] = (ak.LoRA(rank=2),)
    tolerance: ClassVar[float] = 0.0
    checks_itself: ClassVar[bool] = False

    def each(self) -> Iterator[tuple[str, ak.Adapters, torch.nn.Module, Path]]:
        """An adapter `mine` on every tiny model where its config fits, and a path in an empty folder."""
        families.register()
        found = False
        for config in self.configs:
            for example in EXAMPLES:
                model = example.make().eval()
                adapters = ak.Adapters(model)
                try:
                    adapters.add("mine", config)
                except AdapterKitError:
                    continue
                found = True
                args, kwargs = example.inputs(3, torch.float32)
                move(adapters, "mine", functools.partial(model, *args, **kwargs))
                with tempfile.TemporaryDirectory() as folder:
                    yield f"{type(config).__name__} on {example.name}", adapters, model, Path(folder) / "file"
        assert found, "no config fits any tiny model"

    def _format(self) -> Format:
        """A new instance, whose methods must come to an end."""
        return Limited(self.format())

    def _write(self, checkpoints: Checkpoint | Mapping[str, Checkpoint], path: Path, points: Points) -> None:
        given = {"": checkpoints} if isinstance(checkpoints, Checkpoint) else checkpoints
        self._format().write(given, path, points, self.format.write_options())

    def _read_all(self, source: Readable, points: Points) -> Mapping[str, Checkpoint]:
        """What is read, and the report is kept to."""
        found, report = self._format().read(Source.of(source), points, self.format.read_options())
        assert isinstance(report, ReadReport), f"read gives {report!r} beside the checkpoints; expected a ReadReport"
        return found

    def _read(self, source: Readable, points: Points) -> Checkpoint:
        """The one that is read."""
        [checkpoint] = self._read_all(source, points).values()
        return checkpoint

    def _recognises(self, path: Path) -> bool:
        try:
            found: object = self._format().recognises(Source.of(path))
        except CheckpointError:
            return False
        assert isinstance(found, bool), f"recognises gives {found!r} for {path.name}"
        return found

    def test_round_trip(self) -> None:
        """What is read is what was written: bit for bit, or in effect within `tolerance`."""
        for name, adapters, model, path in self.each():
            written, points = adapters.checkpoint("mine"), adapters.points()
            self._write(written, path, points)
            read = self._read(path, points)
            self._check_same(name, read, written)
            self._check_effect(name, adapters, model, read)

    def test_several_in_one_file(self) -> None:
        """Several adapters come back by name; a format of one refuses them, and writes nothing."""
        for name, adapters, model, path in self.each():
            written, points = adapters.checkpoint("mine"), adapters.points()
            adapters.remove("mine")
            adapters.add("mine", ak.get_plugin_manager().adapter(written.type).load().from_dict(written.config), seed=1)
            many = {"first": written, "Second-2": adapters.checkpoint("mine")}
            place = path.with_name("several")
            try:
                self._write(many, place, points)
            except CheckpointError:
                assert not place.exists(), f"{name}: a refused file of two is there"
                continue
            assert self._recognises(place), f"{name}: a file of two is not recognised"
            found = self._read_all(place, points)
            assert list(found) == list(many), f"{name}: {', '.join(found)} came back instead of {', '.join(many)}"
            for key, checkpoint in many.items():
                self._check_same(f"{key} of two, {name}", found[key], checkpoint)
            adapters.remove("mine")
            adapters.install("mine", written)
            self._check_effect(f"the first of two, {name}", adapters, model, found["first"])

    def test_several_types(self) -> None:
        """All parts of an adapter of several types come back; a format of one refuses them, and writes nothing."""
        for name, adapters, _, path in self.each():
            written, points = adapters.checkpoint("mine"), adapters.points()
            if len(halves := in_halves(written)) < 2:
                continue
            try:
                self._write(written.replace(parts=halves), path, points)
            except CheckpointError:
                assert not path.exists(), f"{name}: a refused file of two types is there"
                continue
            found = [p.tensors for p in self._read(path, points).parts]
            kept = {(key, part) for tensors in found for key, own in tensors.items() for part in own}
            lost = {(key, part) for key, own in written.tensors.items() for part in own} - kept
            assert not lost or self.tolerance, f"{name}: {len(lost)} tensors of a file of two types are lost: {lost}"
            assert len(kept) >= len(written.tensors), f"{name}: a part of a file of two types is lost"

    def test_metadata(self) -> None:
        """Text beside the tensors comes back, and a file without has none of ours."""
        for name, adapters, _, path in self.each():
            points, said = adapters.points(), {"trigger": 'ünïcode, "quotes"\n', "steps": "10"}
            self._write(adapters.checkpoint("mine").replace(metadata=said), path, points)
            found = self._read(path, points).metadata
            lost = {key: text for key, text in said.items() if found.get(key) != text}
            assert not lost, f"{name}: metadata came back as {dict(found)}; expected {said}"
            return

    def test_dtype(self) -> None:
        """Floating-point tensors are written in the dtype that is asked for, and the effect is as near as that is."""
        for name, adapters, model, path in self.each():
            points, options = adapters.points(), self.format.write_options(dtype=torch.bfloat16)
            self._format().write({"": adapters.checkpoint("mine")}, path, points, options)
            read = self._read(path, points)
            for dtype in dtypes_in(path, read):
                assert dtype == torch.bfloat16, f"{name}: {dtype} in a file of bfloat16; use options.cast"
            self._check_effect(name, adapters, model, read, 0.05)

    def test_tensors_in_memory(self) -> None:
        """The file's tensors and metadata, in memory, are recognised and read as the file is, and left as they are."""
        for name, adapters, _, path in self.each():
            points = adapters.points()
            self._write(adapters.checkpoint("mine"), path, points)
            source = Source.of(path)
            try:
                given, metadata = source.tensors(), dict(source.metadata)
            except CheckpointError:
                skip("the format writes no safetensors file")
            before, keys = {key: tensor.clone() for key, tensor in given.items()}, list(given)
            memory = Source.of(given, metadata)
            assert self._format().recognises(memory), f"{name}: a file's tensors in memory are not recognised"
            read = self._read(memory, points)
            assert_parts(name, read, self._read(path, points))
            for tensor in (t for part in read.parts for own in part.tensors.values() for t in own.values()):
                tensor.fill_(1)
            assert list(given) == keys, f"{name}: other keys in the dict that was read"
            for key, tensor in given.items():
                assert_same(tensor, before[key], f"{name}: {key} in memory, after it was read and changed")
            return

    def _check_same(self, name: str, read: Checkpoint, written: Checkpoint) -> None:
        """Bit for bit, where the format says that it is exact."""
        assert read.type == written.type or self.tolerance, f"{name}: type {read.type}, not {written.type}"
        if not self.tolerance:
            assert read.config == written.config, f"{name}: the config changed: {read.config}"
            assert_equal(name, read, written)

    def _check_effect(
        self, name: str, adapters: ak.Adapters, model: torch.nn.Module, read: Checkpoint, tolerance: float = 1e-6
    ) -> None:
        """Compares what `mine` does with what was read of it; a name ends in that of its example."""
        args, kwargs = example_of(name).inputs(3, torch.float32)
        adapters.freeze()
        with adapters.activated("mine"):
            expected = model(*args, **kwargs)
        adapters.install("again", read)
        with adapters.activated("again"):
            assert_close(model(*args, **kwargs), expected, max(self.tolerance, tolerance), f"{name}: the effect")
        adapters.remove("again")

    def test_the_caller_keeps_its_tensors(self) -> None:
        """Writing changes and keeps none of the checkpoint's tensors, and two reads share no memory."""
        for name, adapters, _, path in self.each():
            written, points = adapters.checkpoint("mine"), adapters.points()
            before = copied(written)
            self._write(written, path, points)
            assert_equal(name, written, before)
            one, other = (self._read(path, points) for _ in range(2))
            for key, own in one.tensors.items():
                for part, tensor in own.items():
                    if tensor.numel():
                        tensor.zero_()
                        expected = other.tensors[key][part]
                        assert tensor.data_ptr() != expected.data_ptr(), f"{name}: two reads share {key}/{part}"

    def test_content_tells_the_format(self) -> None:
        """A file is recognised by its content, whatever its name, and nothing else is."""
        for name, adapters, _, path in self.each():
            for ending in ("", ".bin", ".txt", ".safetensors"):
                place = path.with_name(f"adapter{ending}")
                self._write(adapters.checkpoint("mine"), place, adapters.points())
                assert self._recognises(place), f"{name}: its own file is not recognised as {place.name}"
            for foreign in foreign_files(path.parent):
                assert not self._recognises(foreign), f"{name}: {foreign.name} is taken for one of its files"
            assert not self._recognises(path.with_name("absent")), f"{name}: a file that is not there"
            self._recognises(path.parent)  # a folder is none, or is one: nothing but a CheckpointError may be raised
            strange = Source.of({"weight": torch.ones(2)}, {"format": "pt"})
            with contextlib.suppress(CheckpointError):
                assert not self._format().recognises(strange), f"{name}: a tensor in memory is taken for an adapter"

    def test_foreign_files_are_refused(self) -> None:
        """Reading what is of another format is a CheckpointError, as is all that `diagnose` has to say of it."""
        for name, adapters, _, path in self.each():
            for foreign in foreign_files(path.parent):
                with contextlib.suppress(CheckpointError):
                    self._format().diagnose(Source.of(foreign))
                with expecting(CheckpointError, "", f"{name}: {foreign.name} was read"):
                    self._read_all(foreign, adapters.points())
            return

    def test_recognition_is_quick(self) -> None:
        """Every file is recognised, or not, in two seconds: one's own, another's, damaged, and one of 256 MB."""
        for _name, adapters, _model, path in self.each():
            self._write(adapters.checkpoint("mine"), path, adapters.points())
            whole = path.read_bytes() if path.is_file() else b""
            large, cut = path.with_name("large"), path.with_name("cut")
            cut.write_bytes(whole[: len(whole) // 2])
            with large.open("wb") as file:
                file.write(whole[:64])
                file.truncate(_LARGE)  # sparse: it takes no room
            for place in (path, cut, large, *foreign_files(path.parent)):
                self._recognises(place)
            return

    def test_damaged_files_are_errors(self) -> None:
        """A file cut short is a CheckpointError; a changed byte is one too, or is read: never another exception."""
        for name, adapters, _, path in self.each():
            points = adapters.points()
            self._write(adapters.checkpoint("mine"), path, points)
            if not path.is_file():
                skip("the format writes a folder")
            whole = path.read_bytes()
            for length in sorted({0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}):
                path.write_bytes(whole[:length])
                with expecting(CheckpointError, "", f"{name}: a file of {length} of {len(whole)} bytes was read"):
                    self._read_all(path, points)
            self._flip(name, path, whole, points)
            return

    def _flip(self, name: str, path: Path, whole: bytes, points: Points) -> None:
        generator = torch.Generator().manual_seed(0)
        for place in torch.randint(len(whole), (_FLIPS,), generator=generator).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
            try:
                self._read_all(path, points)
            except AdapterKitError:
                continue
            except Exception as error:
                raise AssertionError(f"{name}: byte {place} changed gives {type(error).__name__}: {error}") from error
            assert not self.checks_itself, f"{name}: a file with byte {place} changed was read"

    def test_writing_is_atomic(self) -> None:
        """A write that fails leaves the old file, and none leaves anything beside its file."""
        for name, adapters, _, path in self.each():
            points, checkpoint = adapters.points(), adapters.checkpoint("mine")
            self._write(checkpoint, path, points)
            assert [p.name for p in path.parent.iterdir()] == [path.name], f"{name}: writing left more than its file"
            old = path.read_bytes() if path.is_file() else b""
            broken = checkpoint.replace(tensors={"no point@x": {"a": torch.zeros(1, dtype=torch.complex64)}})
            with expecting(CheckpointError, "", f"{name}: a tensor of complex numbers was written"):
                self._write(broken, path, points)
            assert [p.name for p in path.parent.iterdir()] == [path.name], f"{name}: a failed write left a file"
            assert not old or path.read_bytes() == old, f"{name}: a failed write changed the old file"
            with expecting(CheckpointError, "", f"{name}: writing into a folder that is not there succeeded"):
                self._write(checkpoint, path / "no" / "such" / "folder", points)
            return

    def test_through_the_handle(self) -> None:
        """`adapters.save(format=...)` and `adapters.load`, which finds the format by itself, give the same effect."""
        for name, adapters, model, path in self.each():
            spec = next((s for s in ak.get_plugin_manager().formats().values() if s.load() is self.format), None)
            if spec is None:
                skip("the format is not registered")
            args, kwargs = example_of(name).inputs(3, torch.float32)
            adapters.freeze()
            expected = model(*args, **kwargs)
            adapters.save("mine", path, format=spec.name)
            adapters.load(path, "again")
            with adapters.activated("again"):
                assert_close(model(*args, **kwargs), expected, max(self.tolerance, 1e-6), f"{name}: the effect")


def check_format(format: type[Format], configs: tuple[ak.AdapterConfig, ...] | None = None) -> CheckReport:
    """Runs every check on a format, without pytest; see `FormatConformance`.

    Args:
        format: The class.
        configs: By default those that the class names, or else a LoRA.
    """
    said = {key: value for cls in reversed(format.__mro__) for key, value in vars(cls).items() if key in _SAID}
    said |= {"format": format} if configs is None else {"format": format, "configs": configs}
    return run_checks(format.__name__, type(f"Test{format.__name__}", (FormatConformance,), said)())
