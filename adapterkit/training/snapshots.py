"""Training checkpoints: whole or absent, without pickle, and read with suspicion.

    RUN/checkpoints/step-000100/adapter.safetensors     the adapter, as `Adapters.save` writes it
                                optimizer.safetensors   the optimizer's tensors, `<parameter>|<name>`
                                NAME.safetensors        what else is trained
                                state.json              the step, small values, and the hash of every other file

A folder is written under another name, flushed to the disk and renamed. Data order, dropout and noise are functions of
the seed and the step (`order.py`), so there is no state of a random generator to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapterkit.errors import CheckpointError, CorruptFileError

ADAPTER = "adapter.safetensors"
_STATE = "state.json"
_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")
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
        names = [entry.name for entry in self.folder.iterdir() if entry.is_dir()] if self.folder.is_dir() else []
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
        """Writes a checkpoint, then deletes the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary = self.folder / f".tmp-{step:06d}-{os.getpid()}"
        temporary.mkdir()
        save_adapter(temporary / ADAPTER)
        for name, group in tensors.items():
            (temporary / f"{name}.safetensors").write_bytes(save(copies(group)))
        hashes = {file.name: _sha256(file.read_bytes()) for file in sorted(temporary.iterdir())}
        state = {"version": _VERSION, "step": step, "files": hashes, "values": dict(values)}
        (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        self._publish(temporary, self.path(step))
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
            CorruptFileError: A file is missing, or is not what was written.
        """
        folder = self.path(step)
        state = _read_state(folder / _STATE)
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


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(_read_bytes(path))
    except ValueError as error:
        raise CorruptFileError(f"no JSON: {error}", path) from error
    shape = {"version": int, "step": int, "files": dict, "values": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in shape.items()):
        raise CorruptFileError(f"must hold {', '.join(shape)}", path)
    if state["version"] != _VERSION:
        raise CorruptFileError(f"version {state['version']} is not one that this release reads ({_VERSION})", path)
    if ADAPTER not in state["files"] or any(Path(name).name != name for name in state["files"]):
        raise CorruptFileError(f"must list {ADAPTER} and plain file names, not {sorted(state['files'])}", path)
    return state


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptFileError(error.strerror or "cannot be read", path) from error


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptFileError(str(error), path) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
