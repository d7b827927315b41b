"""Training checkpoints: whole or absent, without pickle, and read with suspicion.

    RUN/checkpoints/step-000100/adapter.safetensors     the adapter, as `Adapters.save` writes it
                                optimizer.safetensors   the optimizer's tensors, `<parameter>|<name>`
                                NAME.safetensors        what else is trained
                                state.json              the step, small values, and the hash of every file

A folder is written under another name, flushed to the disk and renamed. Data order, dropout and noise are functions of
the seed and the step (`order.py`), so there is no state of a random generator to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapterkit.errors import CheckpointError, CorruptFileError, TrainingError
from adapterkit.formats import strict_json
from adapterkit.formats.files import open_plain, unreadable, write_atomically
from adapterkit.formats.strict_json import StrictJSONError

ADAPTER = "adapter.safetensors"
_STATE = "state.json"
_VERSION = 2
_NAME = re.compile(r"step-(\d{6,15})")
_STATE_LIMIT = 1 << 24
_GO_ON = "Make room, or mend what is wrong, and go on from the newest checkpoint with --resume"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that has been read and found whole.

    Attributes:
        folder: Where it is.
        step: How many optimizer steps it has seen.
        values: JSON values of the trainer.
        tensors: File name without ending -> name -> tensor; the adapter's own file is left to `Adapters.load`.
    """

    folder: Path
    step: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


class Snapshots:
    """The checkpoints of one run.

    Args:
        folder: Holds them; made when the first one is written.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; whether it is whole is not known."""
        try:
            names = [entry.name for entry in self.folder.iterdir() if entry.is_dir()] if self.folder.is_dir() else []
        except OSError as error:
            raise unreadable(self.folder, error) from error
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:06d}"

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        save_adapter: Callable[[Path], object],
    ) -> Path:
        """Writes a checkpoint, then deletes the oldest ones.

        Raises:
            TrainingError: It cannot be written, such as where the disk is full. Earlier ones are as they were.
        """
        with writing(self.path(step)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            temporary = self.folder / f".tmp-{step:06d}-{os.getpid()}"
            try:
                temporary.mkdir()
                save_adapter(temporary / ADAPTER)
                for name, group in tensors.items():
                    (temporary / f"{name}.safetensors").write_bytes(save(copies(group)))
                hashes = {file.name: _sha256(file.read_bytes()) for file in sorted(temporary.iterdir())}
                state = {"version": _VERSION, "step": step, "files": hashes, "values": dict(values)}
                text = json.dumps({**state, "checksum": _checksum(state)}, indent=1)
                (temporary / _STATE).write_text(text, encoding="utf-8")
                self._publish(temporary, self.path(step))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        return self.path(step)

    def newest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Raises:
            CorruptFileError: There are checkpoints, and every one is damaged.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                _log.warning("checkpoint skipped: %s", error)
                failures.append(str(error))
        if failures:
            raise CorruptFileError(
                f"no checkpoint is whole ({'; '.join(failures)}); start again with --overwrite", self.folder
            )
        return None

    def read(self, step: int) -> Snapshot:
        """The checkpoint of one step.

        Raises:
            CheckpointError: A file is missing, is no plain file, or is not what was written.
        """
        folder = self.path(step)
        state = _read_state(folder / _STATE)
        if state["step"] != step:
            raise CorruptFileError(f"is of step {state['step']}, in the folder of step {step}", folder / _STATE)
        tensors = {}
        for name, expected in state["files"].items():
            data = _read_bytes(folder / name)
            if _sha256(data) != expected:
                raise CorruptFileError("its contents are not those that were written", folder / name)
            if name != ADAPTER:
                tensors[Path(name).stem] = _parse(data, folder / name)
        return Snapshot(folder, state["step"], state["values"], tensors)

    def _publish(self, temporary: Path, final: Path) -> None:
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if final.exists():  # a damaged one that a resumed run fell back from, or the same step written again
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(self.folder)

    def _sweep(self) -> None:
        for stale in self.folder.glob(".tmp-*"):
            shutil.rmtree(stale)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: on the CPU, and apart where several share their memory."""
    return {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces a safetensors file at once; whoever might read the old one may read the new one.

    Raises:
        CheckpointError: It cannot be written.
    """
    write_atomically(path, save(copies(tensors)))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: There is no such file, it is no plain file, or it is damaged.
    """
    return _parse(_read_bytes(path), path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file of a run that cannot be written in the block, and how the run goes on.

    Raises:
        TrainingError: In the place of what the system says.
    """
    try:
        yield
    except CheckpointError as error:
        raise TrainingError(f"{error}. {_GO_ON}") from error
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}. {_GO_ON}") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = strict_json.loads(_read_bytes(path, _STATE_LIMIT))
    except StrictJSONError as error:
        raise CorruptFileError(f"is {error}", path) from error
    shape = {"version": int, "step": int, "files": dict, "values": dict, "checksum": str}
    if isinstance(state, dict) and state.get("version") != _VERSION:
        told = f"version {state.get('version')!r:.80} is not one that this release reads ({_VERSION})"
        raise CorruptFileError(told, path)
    if not isinstance(state, dict) or any(type(state.get(key)) is not kind for key, kind in shape.items()):
        raise CorruptFileError(f"must hold {', '.join(shape)}", path)
    if _checksum({key: value for key, value in state.items() if key != "checksum"}) != state["checksum"]:
        raise CorruptFileError("its contents are not those that were written", path)
    if ADAPTER not in state["files"] or any(Path(name).name != name for name in state["files"]):
        raise CorruptFileError(f"must list {ADAPTER} and plain file names, not {sorted(state['files'])}", path)
    return state


def _checksum(state: Mapping[str, Any]) -> str:
    """Of a state without its checksum. Its keys have no order."""
    return _sha256(json.dumps(state, sort_keys=True).encode())


def _read_bytes(path: Path, limit: int = 1 << 50) -> bytes:
    with open_plain(path, limit) as (file, _):
        return file.read()


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(f"is damaged: {error}", path) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
