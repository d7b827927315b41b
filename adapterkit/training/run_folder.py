"""The run folder: what is in it, when it may be used, and its text files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import StateError
from adapterkit.formats.files import write_atomically
from adapterkit.training import yaml_values
from adapterkit.training.data_record import DataRecord, read_record, write_record
from adapterkit.training.resuming import check_same, read_run
from adapterkit.training.run import Run
from adapterkit.training.snapshots import ADAPTER, Snapshots, writing


class RunFolder:
    """Paths below the run's `output`, and the rules for opening it.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = Path(run.config.output)
        self.adapter = self.path / ADAPTER
        self.config = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.summary = self.path / "summary.json"
        self.best = self.path / "best"
        self.trackers = self.path / "trackers"
        self.picture = self.path / "metrics.png"
        self.snapshots = Snapshots(self.path / "checkpoints", run.config.keep_checkpoints)
        self._held: int | None = None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Says no before anything is loaded.

        Raises:
            StateError: The folder holds something and neither flag is given; or it is no folder, or one in the data's.
            ConfigError: The run to be resumed has another configuration.
        """
        if resume and overwrite:
            raise StateError("resume and overwrite exclude each other")
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"output {self.path} is not a folder; choose another one")
        data = Path(self.run.config.data)
        if data.is_dir() and self.path.resolve().is_relative_to(data.resolve()):
            raise StateError(
                f"output {self.path} lies in the data folder {data}, where what the run writes would be data; choose "
                "another one with output=FOLDER"
            )
        if not self._in_use():
            return
        if not resume and not overwrite:
            raise StateError(
                f"output {self.path} is not empty; add --resume to go on, --overwrite to start again, "
                "or choose another folder with output=FOLDER"
            )
        if overwrite and not self.config.exists():
            raise StateError(f"output {self.path} holds files but no run (no config.yaml), so it is not overwritten")
        if resume:
            self._check_same_run()

    def run_before(self) -> Run | None:
        """The run as the folder has it; None where there is none."""
        return read_run(self.config) if self.config.exists() else None

    def data_before(self) -> DataRecord | None:
        """What the data was when the run began; None where an earlier release began it."""
        return read_record(self.data)

    def open(self, record: DataRecord, *, overwrite: bool) -> None:
        """Makes the folder, removes what an overwritten run left, and writes what is trained, and on which data.

        Raises:
            StateError: Another process trains in it; it does so alone until `close`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"output {self.path} cannot be made: {error.strerror}"
            raise StateError(f"{told}; choose another folder with output=FOLDER") from error
        self.hold()
        if overwrite:
            self._clear()
            self.samples.mkdir()
        self.summary.unlink(missing_ok=True)
        write_text(self.config, yaml_values.dump(self.run.resolved()))
        write_text(self.data, write_record(record))

    def close(self) -> None:
        """Lets other processes train in the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def withdraw(self) -> None:
        """Removes a run that has come to nothing; the folder too, where nothing else is in it."""
        self._clear()
        self.config.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Writes down that the run is finished, and what it came to."""
        write_text(self.summary, json.dumps(dict(values), indent=1, default=str))

    def read_summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote; None where the run is not finished."""
        try:
            values = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None

    def recent_losses(self, most: int) -> list[float]:
        """The losses of the last steps, as far as the metrics have them."""
        return [record["loss"] for record in self.records() if "lr" in record and "loss" in record][-most:]

    def records(self) -> list[dict[str, Any]]:
        """The metrics, in order."""
        return read_metrics(self.metrics) if self.metrics.exists() else []

    def start_metrics(self, step: int) -> None:
        """Forgets the records after `step`: a resumed run makes them again."""
        records = read_metrics(self.metrics) if self.metrics.exists() else []
        kept = [record for record in records if record["step"] <= step] if step else []
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def base_figures(self) -> dict[str, float]:
        """What the task measured of the base model, before the first step, as `base NAME`."""
        records = [record for record in read_metrics(self.metrics) if record["step"] == 0]
        return {f"base {key}": value for key, value in records[0].items() if key != "step"} if records else {}

    def record(self, values: Mapping[str, Any]) -> None:
        """Appends a line to the metrics."""
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")

    @contextlib.contextmanager
    def opened(self, record: DataRecord, done: int, begun: Callable[[], bool], *, overwrite: bool) -> Iterator[None]:
        """Opens the folder, and withdraws it where a new run ends before its first step.

        Args:
            record: What the data is.
            done: Steps that are done already; later records are forgotten.
            begun: Whether a step is done by now.
            overwrite: Replace the run that it holds.
        """
        fresh = overwrite or not self.config.exists()
        self.open(record, overwrite=overwrite)
        self.start_metrics(done)
        try:
            yield
        except BaseException:
            if fresh and not begun():
                self.withdraw()
            raise

    def hold(self) -> None:
        """Keeps other processes from training in the folder, until `close`.

        Raises:
            StateError: Another one does.
        """
        with writing(self.samples):
            self.samples.mkdir(exist_ok=True)
        if sys.platform == "win32":
            return  # it has no locks on folders
        import fcntl

        self._held = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StateError(f"output {self.path} is in use: another process trains there") from error
        except OSError:
            return  # a file system without locks

    def _in_use(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _clear(self) -> None:
        """Removes a run's own files but its configuration, and nothing else that may be in the folder."""
        for folder in (
            self.samples,
            self.snapshots.folder,
            self.best,
            self.trackers,
            self.path / "export",
            self.path / "model",
        ):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.data, self.metrics, self.adapter, self.summary, self.picture, self.path / "README.md"):
            file.unlink(missing_ok=True)

    def _check_same_run(self) -> None:
        if not self.config.exists():
            raise StateError(
                f"output {self.path} holds files but no run (no config.yaml), so there is nothing to resume"
            )
        check_same(read_run(self.config), self.run, self.config)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file up to the first line that is none, such as one that a crash cut short."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new one."""
    with writing(path):
        write_atomically(path, text.encode())
