"""Pictures with their classes, as people have them: a subfolder for each class, parts of a split, or a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.errors import DataError
from adapterkit.training.classification.examples import Example, Found
from adapterkit.training.classification.tables import Columns, only_table, table_examples
from adapterkit.training.data_files import Notes, is_hidden
from adapterkit.training.image_folder import image_files

PARTS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What the parts of a split are called, and what they are for."""


def find(data: Path, validation: Path | None, columns: Columns, notes: Notes) -> Found:
    """The pictures of a folder or of a table.

    A folder has one subfolder for each class; or it has the parts `train` and `val` or `test`, each with subfolders of
    classes or with a table; or it has a table.

    Args:
        data: The folder, or the table.
        validation: Another one to measure with.
        columns: Of tables.
        notes: Takes up what is left out.

    Raises:
        DataError: There is nothing of the kind.
    """
    if not data.exists():
        raise DataError(f"data {data} is not a folder or a table (looked in {Path.cwd()})")
    folders = _split(data, notes) if data.is_dir() else {}
    aside = _Aside()
    if folders:
        parts = {
            part: _examples(folder, columns, notes, aside, training=part == "training")
            for part, folder in folders.items()
        }
    else:
        parts = _by_part(_examples(data, columns, notes, aside), data)
    if validation is not None:
        if "validation" in parts:
            notes.add("left out, for options.validation is measured with", folders.get("validation", data))
        parts["validation"] = _examples(validation, columns, notes, aside, training=False)
    if "validation" not in parts and "test" in parts:
        parts["validation"] = parts.pop("test")
    return Found(parts["training"], parts.get("validation"), parts.get("test", ()), aside.tables, aside.empty)


@dataclass
class _Aside:
    """What is found beside pictures."""

    tables: list[Path] = field(default_factory=list[Path])
    empty: list[Path] = field(default_factory=list[Path])


def _split(folder: Path, notes: Notes) -> dict[str, Path]:
    """The folders of a split by what they are for; none where the subfolders are classes.

    Raises:
        DataError: There are parts, and none or several to train on.
    """
    names = _subfolders(folder)
    parts = {name: PARTS[name.casefold()] for name in names if name.casefold() in PARTS}
    if not parts or (len(parts) < len(names) and not {"training"} < set(parts.values())):
        return {}
    if "training" not in parts.values():
        raise DataError(
            f"data {folder} holds {', '.join(names)}, not classes, and nothing to train on; name one of them: "
            f"{folder}/{names[0]}"
        )
    if len(set(parts.values())) < len(parts):
        raise DataError(f"data {folder} holds several folders for one purpose: {', '.join(parts)}; keep one of each")
    for name in names:
        if name not in parts:
            notes.add("left out, no part of the split", folder / name)
    return {part: folder / name for name, part in parts.items()}


def _by_part(examples: Sequence[Example], data: Path) -> dict[str, Sequence[Example]]:
    """The examples by what a table says that they are for; training, where it says nothing.

    Raises:
        DataError: It says so of none to train on.
    """
    parts: dict[str, list[Example]] = {}
    for one in examples:
        parts.setdefault(one.part or "training", []).append(one)
    if "training" not in parts:
        raise DataError(f"data {data} has no row to train on ({', '.join(parts)})")
    return dict(parts)


def _examples(
    place: Path, columns: Columns, notes: Notes, aside: _Aside, *, training: bool = True
) -> Sequence[Example]:
    """Those of a table, or of a folder with a table or with a subfolder for each class."""
    table = place if place.is_file() else only_table(place)
    if table is not None and (place.is_file() or len(_subfolders(place)) < 2):
        aside.tables.append(table)
        return table_examples(table, columns, PARTS, notes)
    found = class_images(place, notes, training=training)
    if training:
        aside.empty += [place / name for name, files in found.items() if not files]
    return [Example(path, (name,)) for name, files in found.items() for path in files]


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry))


def class_images(folder: Path, notes: Notes, *, training: bool = True) -> dict[str, list[Path]]:
    """The images of each class: those in the subfolder of its name, sorted.

    Args:
        folder: That of the classes.
        notes: Takes up what is left out.
        training: Whether to train on them; to measure with, one class will do.

    Returns:
        Their files by class; of a class without an image an empty list.

    Raises:
        DataError: There are fewer than two subfolders, or no image at all.
    """
    if not folder.is_dir():
        raise DataError(f"data {folder} is not a folder (looked in {Path.cwd()})")
    names = _subfolders(folder)
    if len(names) < (2 if training else 1):
        raise DataError(f"data {folder} needs one subfolder of images for each of two or more classes; found {names}")
    classes: dict[str, list[Path]] = {name: [] for name in names}
    for path in image_files(folder, notes):
        if path.parent == folder:
            notes.add("left out, in no folder of a class", path)
        else:
            classes[path.relative_to(folder).parts[0]].append(path)
    for name, files in classes.items():
        if not files and not training:
            notes.add("classes without an image to measure with", folder / name)
    return classes
