"""A model with an adapter in its weights, in the layout that the model's own files have.

Files are written tensor by tensor: besides the adapter, one module of the model is in memory.
"""

from __future__ import annotations

import json
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.fields import is_number
from adapterkit.errors import CheckpointError, ConfigError, NotMergeableError, shown
from adapterkit.formats import container
from adapterkit.formats.container import Header
from adapterkit.formats.files import write_stream
from adapterkit.handle.merged_weights import Target, merged
from adapterkit.points import ParameterPoint, WeightLayout
from adapterkit.tools.base import Base
from adapterkit.tools.modules import Placed, modules
from adapterkit.tools.stored import Slot, StoredModel, is_whole
from adapterkit.tools.tensor_files import TensorFiles

_HASHES = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "hash_sha256"})
"""Metadata that says what the tensors' bytes are, and is not true of others."""
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"})


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        path: The file or folder.
        tensors: How many were made anew.
        files: Those that hold them.
        left_out: Further files of weights, which would still be the base's, and so were not taken along.
    """

    path: Path
    tensors: int
    files: Sequence[str] = ()
    left_out: Sequence[str] = ()


@dataclass
class _Change:
    """A parameter that changes, and the bias beside it: what acts there.

    Attributes:
        model, path, layout: The module.
        parameters: Those of the model that may be others afterwards, and their places in its files.
        placed: What acts there.
    """

    model: StoredModel
    path: str
    layout: WeightLayout
    parameters: Mapping[str, Slot]
    placed: list[Placed] = field(default_factory=list)

    def values(self, weight: float) -> dict[str, Tensor]:
        """Parameter -> its new value, for those that change.

        Raises:
            NotMergeableError: The files have no place for it.
        """
        target = Target(self.model.module(self.path), self.path, self.layout)
        for one in self.placed:
            assert one.point is not None
            assert one.module is not None
            target.matrices.setdefault(one.point.layout.index, {})[one.key] = (one.point, [(one.module, weight)])
        names = (self.layout.parameter, self.layout.bias_parameter)
        made = {name: value for name, value in zip(names, merged(target), strict=True) if value is not None}
        for name, value in made.items():
            was = target.module._parameters[name]
            if was is None:
                raise NotMergeableError(
                    f"{self.path} has no {name}, and the merged layer needs one: the files have no key"
                )
            if was.shape != value.shape:
                raise NotMergeableError(
                    f"{self.path}.{name} would be {tuple(value.shape)}, and the files have {tuple(was.shape)}"
                )
        return {_below(self.path, name): value for name, value in made.items()}


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def bake(base: Base, source: Path, checkpoint: Checkpoint, target: Path, *, weight: float = 1.0) -> Baked:
    """Writes a model's files anew, with an adapter in the weights: the very values that a merge in memory gives.

    Args:
        base: The model.
        source: Its file or folder. What else is in the folder is copied, but for further files of its weights.
        checkpoint: The adapter.
        target: A file or folder that does not exist yet.
        weight: How strongly the adapter acts.

    Raises:
        NotMergeableError: The adapter has no equivalent weight somewhere, or the model's files no place for it.
        CheckpointError: It is for another model, its target exists, or it cannot be written.
        ModelNotFoundError: The model's weights are not in its files by names that are known.
    """
    if not is_number(weight):
        raise ConfigError([f"weight must be a number, not {shown(weight)}"], "bake()")
    _check_target(target)
    new = _NewTensors(_changes(base, checkpoint), weight)
    if source.is_dir():
        left_out = _write_folder(source, target, new)
        names = [str(path.relative_to(source)) for path in new.files]
    else:
        write_stream(target, _pieces(source, new))
        left_out, names = [], [target.name]
    return Baked(target, new.count, names, left_out)


def _check_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError("exists already; name a new one, or remove it first", target)
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it with mkdir -p", target)


def _changes(base: Base, checkpoint: Checkpoint) -> list[_Change]:
    """What acts on each parameter. What no file could hold is an error here, before anything is written."""
    found: dict[tuple[str, str, str], _Change] = {}
    for placed in modules(checkpoint, base.points):
        point, module = placed.point, placed.module
        assert module is not None
        if not isinstance(point, ParameterPoint) or not module.abilities.merge:
            raise NotMergeableError(
                f"{placed.key}: {type(module).__name__} acts otherwise than by another weight, and cannot be baked"
            )
        key = (point.model, point.path, point.layout.parameter)
        if key not in found:
            model = base.model(point.model)
            found[key] = _Change(model, point.path, point.layout, _slots(model, point))
        found[key].placed.append(placed)
    return [*found.values()]


def _slots(model: StoredModel, point: ParameterPoint) -> dict[str, Slot]:
    """The places of the parameters that may change.

    Raises:
        NotMergeableError: One is another's too, which would change with it, or holds a code for numbers.
    """
    own = model.root.get_submodule(point.path)._parameters
    found: dict[str, Slot] = {}
    for parameter in [_below(point.path, name) for name in point.parameters if own.get(name) is not None]:
        if len(tied := model.tied(parameter)) > 1:
            raise NotMergeableError(
                f"{' and '.join(tied)} are one weight in the files; bake in memory, with Adapters.bake, which tells "
                "the model that they are two"
            )
        slot = found[parameter] = model.slot(parameter)
        if not is_whole(model.files.entry(slot.key).dtype):
            dtype = model.files.entry(slot.key).dtype
            raise NotMergeableError(
                f"{parameter} is {dtype} in the files, which keeps no merge; take an unquantized base"
            )
    return found


class _NewTensors:
    """The tensors of files that are others with the adapter, made when they are asked for."""

    def __init__(self, changes: Sequence[_Change], weight: float) -> None:
        self._weight = weight
        self._waiting: dict[tuple[int, str], Tensor] = {}
        self._of: dict[Path, dict[str, list[tuple[_Change, str, Slot]]]] = {}
        self.sources: dict[Path, TensorFiles] = {}
        for change in changes:
            files = change.model.files
            if not isinstance(files, TensorFiles):
                raise CheckpointError(
                    "the model is in memory, and no files of it could be written anew; Adapters.bake does"
                )
            for parameter, slot in change.parameters.items():
                path = files.path(slot.key)
                self.sources[path] = files
                self._of.setdefault(path, {}).setdefault(slot.key, []).append((change, parameter, slot))

    @property
    def files(self) -> list[Path]:
        """Those that are written anew."""
        return [*self.sources]

    @property
    def count(self) -> int:
        """How many tensors may be others."""
        return sum(len(own) for own in self._of.values())

    def of(self, path: Path, key: str, tensor: Tensor) -> Tensor:
        """A tensor of a file, with the adapter in it."""
        for change, parameter, slot in self._of[path].get(key, ()):
            value = self._value(change, parameter)
            tensor = tensor if value is None else slot.put(tensor, value)
        return tensor

    def _value(self, change: _Change, parameter: str) -> Tensor | None:
        """A parameter's new value. What is made with it waits for its turn, which comes soon: files are in order."""
        known = self._waiting.pop((id(change), parameter), None)
        if known is not None:
            return known
        values = change.values(self._weight)
        self._waiting = {key: value for key, value in self._waiting.items() if value.ndim == 1}
        self._waiting |= {(id(change), name): value for name, value in values.items() if name != parameter}
        return values.get(parameter)


def _pieces(path: Path, new: _NewTensors) -> Iterator[bytes | memoryview]:
    """The bytes of a file with the new tensors, one after another. All offsets are those that it has."""
    files = new.sources[path]
    yield _header(files.headers[path])
    for key in files.headers[path].entries:
        tensor = new.of(path, key, files.read(key)).contiguous()
        yield memoryview(container.memory(tensor.reshape(-1).view(torch.uint8)))


def _header(header: Header) -> bytes:
    """A file's header, without what its metadata says of the bytes that follow."""
    if not _HASHES & header.metadata.keys():
        return header.text
    told = json.loads(header.text[8:])
    told["__metadata__"] = {key: value for key, value in header.metadata.items() if key not in _HASHES}
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_folder(source: Path, target: Path, new: _NewTensors) -> list[str]:
    """Writes a folder beside the target, and gives it the name when it is whole.

    Returns:
        What was not taken along: further files of weights, which would still be the base's.
    """
    known = {path for files in new.sources.values() for path in files.headers}
    stale = [path for folder in {source, *(path.parent for path in known)} for path in _stale(folder, known)]
    skipped = {*stale, *new.files}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        shutil.copytree(
            source,
            temporary,
            ignore=lambda folder, names: [n for n in names if Path(folder, n) in skipped],
            copy_function=shutil.copyfile,
        )
        for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            folder.chmod(folder.stat().st_mode | stat.S_IRWXU)  # copied too: the base may be read-only
        for path in new.files:
            write_stream(temporary / path.relative_to(source), _pieces(path, new))
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}", target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(str(path.relative_to(source)) for path in stale)


def _stale(folder: Path, known: set[Path]) -> Iterator[Path]:
    """The files of weights in a folder that are none of the model's, with their indices."""
    for path in folder.iterdir():
        index = path.name.partition(".safetensors.index.json")
        if index[1]:
            if not any(one.parent == folder and one.name.startswith(f"{index[0]}-") for one in known):
                yield path
        elif path.suffix in _SUFFIXES and path not in known:
            yield path
