"""Tokens that outlive a run: kept under what they follow from, checked when they are read, made anew where damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import DataError
from adapterkit.training.data_files import content_key
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.tokens import forget_calls

_VERSION = 1  # of what is kept
_GIVEN_UP = 24 * 3600  # seconds after which whoever wrote is not there any more
_NUMBERS, _INDEX, _RECORD = "numbers", "index", "record.json"
Record = Mapping[str, Any]


class TokenCache:
    """A folder for each set of tokens, written whole or not at all. Runs may share it; it may be deleted at any time.

    Args:
        folder: Where; None keeps them for this process alone.
        near: See `Shelf.temporary`.
    """

    def __init__(self, folder: Path | None, near: Path) -> None:
        self.folder, self.near = folder, near
        self.notes: list[str] = []

    def get(self, parts: tuple[object, ...], make: Callable[[Shelf], Record]) -> tuple[Shelf, Record]:
        """What was made of the same parts, or what is made now.

        Args:
            parts: What it follows from.
            make: Fills a shelf, and returns what else is to be known of it, as JSON has it.

        Raises:
            DataError: Nothing can be written.
        """
        if self.folder is None:
            shelf = Shelf.temporary(self.near)
            with contextlib.closing(shelf):
                record = make(shelf)
                shelf.finish()
            return shelf, record
        digest = hashlib.blake2b(repr((_VERSION, *parts)).encode(), digest_size=16)
        place = self.folder / "tokens" / digest.hexdigest()
        if place.exists():
            with contextlib.suppress(DataError, OSError, ValueError, KeyError, TypeError):
                record = _checked(place)
                self.notes.append(f"tokens are there already, in {place}")
                return _opened(place), record
            self.notes.append(f"tokens in {place} are damaged, and are made anew")
            shutil.rmtree(place, ignore_errors=True)
        return self._made(place, make)

    def _made(self, place: Path, make: Callable[[Shelf], Record]) -> tuple[Shelf, Record]:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _sweep(place.parent)
            part = place.with_name(f"{place.name}.{secrets.token_hex(8)}.part")
            part.mkdir()  # for all who may read the cache, and not as a temporary folder
            try:
                with (part / _NUMBERS).open("w+b") as numbers, (part / _INDEX).open("w+b") as index:
                    record = make(Shelf(numbers, index))
                kept = {"record": record, "sums": _sums(part)}
                (part / _RECORD).write_text(json.dumps(kept), encoding="utf-8")
                with contextlib.suppress(OSError):  # another process was faster, and may be reading its own
                    part.rename(place)
                return _opened(place), record
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            told = f"the cache cannot be written ({error.strerror}); set options.cache to a folder with room"
            raise DataError(told, [place]) from error


def _sweep(folder: Path) -> None:
    """Removes what runs were writing that were killed."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - max(one.stat().st_mtime for one in (part, *part.iterdir())) > _GIVEN_UP:
                shutil.rmtree(part)


def _opened(place: Path) -> Shelf:
    with (place / _NUMBERS).open("rb") as numbers, (place / _INDEX).open("rb") as index:
        return Shelf(numbers, index).finish()


def _checked(place: Path) -> Record:
    """Its record.

    Raises:
        ValueError: It is damaged.
    """
    kept = json.loads((place / _RECORD).read_bytes())
    if kept["sums"] != _sums(place):
        raise ValueError(f"{place} is damaged")
    return kept["record"]


def _sums(place: Path) -> dict[str, str]:
    return {name: content_key(place / name) for name in (_NUMBERS, _INDEX)}


def identity_of_tokenizer(tokenizer: Any) -> str:
    """The same for tokenizers that make the same tokens: a hash of the files that it writes."""
    digest = hashlib.blake2b(digest_size=16)
    forget_calls(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
