"""What the data of a run was: the run folder keeps it, and a run that is resumed is held against it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from adapterkit.errors import CorruptFileError, DataChangedError
from adapterkit.training.data_files import listed

_VERSION = 1
_NONE = "is no record of a run's data; delete it to resume without comparing"


@dataclass(frozen=True)
class DataRecord:
    """What a task found before anything was loaded.

    Attributes:
        files: Name below the data's folder -> `content_key`, for every file that is trained on or measured with.
        classes: The names of the classes by number, where there are any. The files of one are named `CLASS/...`.
        notes: Sentences for the user: what was left out or is not used as it stands, and why.
        facts: What there is, for `--dry-run`: "images" -> "60", "longest caption" -> "31 words, in 7.txt".
    """

    files: Mapping[str, str] = field(default_factory=dict[str, str])
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict[str, str])

    def following(self, before: DataRecord | None) -> DataRecord:
        """The same data with the classes numbered as before, whatever they are called now.

        A class that is new, and most of whose files were in one that is gone, is that one; what else is new comes last.
        """
        if before is None:
            return self
        new = [name for name in self.classes if name not in before.classes]
        gone = [name for name in before.classes if name not in self.classes]
        renamed = {old: name for name in new for old in gone if self._was(name, before, old)}
        kept = [renamed.get(name, name) for name in before.classes]
        return replace(self, classes=[*kept, *(name for name in new if name not in kept)])

    def changes(self, before: DataRecord) -> list[str]:
        """What differs from an earlier record, a sentence each; `self` is `following` it."""
        gone = {name: key for name, key in before.files.items() if name not in self.files}
        held = {key: name for name, key in gone.items()}
        new = {name: key for name, key in self.files.items() if name not in before.files}
        moved = {held.pop(key): name for name, key in new.items() if key in held}
        edited = [name for name, key in self.files.items() if before.files.get(name, key) != key]
        called = [f"{old} -> {name}" for old, name in zip(before.classes, self.classes, strict=False) if old != name]
        found = {
            "classes renamed": called,
            "classes added": self.classes[len(before.classes) :],
            "classes without a file": [name for name in self.classes if before._of(name) and not self._of(name)],
            "files renamed": [f"{old} -> {name}" for old, name in moved.items()],
            "files added": [name for name in new if name not in moved.values()],
            "files removed": [name for name in gone if name not in moved],
            "files edited": edited,
        }
        return [f"{what}: {listed(names)}" for what, names in found.items() if names]

    def _was(self, name: str, before: DataRecord, old: str) -> bool:
        mine = self._of(name)
        return 2 * (mine & before._of(old)).total() > mine.total()

    def _of(self, name: str) -> Counter[str]:
        return Counter(key for file, key in self.files.items() if file.startswith(f"{name}/"))


def resumed(before: DataRecord | None, now: DataRecord, *, accept: bool) -> DataRecord:
    """What a run is resumed on.

    Args:
        before: What the run began with; None where an earlier release kept no record of it.
        now: What there is, `following` it.
        accept: The user has said that it may be other data.

    Raises:
        DataChangedError: They differ and that is not accepted, or there are classes that the run knows nothing of.
    """
    if before is None:
        return replace(now, notes=[*now.notes, "not compared, for the run kept no record of it when it began"])
    changes = now.changes(before)
    if not changes:
        return now
    known = len(now.classes) == len(before.classes)
    if known and accept:
        return replace(now, notes=[*now.notes, *(f"changed since the run began, {change}" for change in changes)])
    way = ", or go on with it as it is: --accept-changed-data" if known else ""
    told = "; ".join(changes)
    raise DataChangedError(
        f"the data has changed since the run began: {told}. Put it back, start again with --overwrite{way}", changes
    )


def write_record(record: DataRecord) -> str:
    """The text of a record's file."""
    kept = {key: value for key, value in asdict(record).items() if key != "facts"}
    return json.dumps({"version": _VERSION, **kept}, indent=1)


def read_record(path: Path) -> DataRecord | None:
    """The record in a file; None where there is no such file.

    Raises:
        CorruptFileError: It holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
        if values["version"] != _VERSION:
            raise CorruptFileError(f"version {values['version']!r} is not one that this release reads", path)
        record = DataRecord(dict(values["files"]), list(values["classes"]), list(values["notes"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{_NONE} ({type(error).__name__})", path) from error
    if not all(isinstance(part, str) for part in (*record.files, *record.files.values(), *record.classes)):
        raise CorruptFileError(f"{_NONE}: names and keys must be text", path)
    return record
