"""The data of a run on language: read, made into text by the template, tokenized, made to fit, and told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError, DataError, RowError
from adapterkit.training.data_files import Notes, content_key, gather, name_of
from adapterkit.training.faults import Faults
from adapterkit.training.language.conversations import Conversation, Document, Exchange, Rendered
from adapterkit.training.language.layouts import LANGUAGE, Columns, Layout, Read, read_as
from adapterkit.training.language.rows import Row, row_files
from adapterkit.training.language.templates import PLAIN, TURNS, Template

Said = Document | Exchange | Conversation


@dataclass(frozen=True)
class Source:
    """A file or folder. Its rows are read whenever they are asked for, and never all of them are in memory.

    Attributes:
        path: The file or folder.
        files: Name -> `content_key`.
        parts: The files that have rows.
        notes: What was left out, and in which columns what was found.
        rows: How many there are with a word to learn.
        is_text: Whether all of them are documents.
    """

    path: Path
    files: dict[str, str]
    parts: Sequence[Read[Any]]
    notes: Sequence[str]
    rows: int
    is_text: bool

    @property
    def layouts(self) -> list[str]:
        """A sentence for each way in which files say something."""
        return list(dict.fromkeys(part.sentence for part in self.parts))

    @property
    def identity(self) -> tuple[object, ...]:
        """What its rows follow from."""
        return tuple(
            (self.files[name_of(one.file, self.path)], one.file.suffix.lower(), one.layout.name, one.columns)
            for one in self.parts
        )

    def __iter__(self) -> Iterator[tuple[Any, Row]]:
        """What each row says, of those with a word to learn."""
        return ((said, row) for part in self.parts for said, row in part if _has_words(said))


def read_source(path: Path, columns: Columns, layouts: Sequence[Layout[Any]] = LANGUAGE) -> Source:
    """Looks at every row of a file or a folder.

    Raises:
        DataError: There is nothing to be learnt, or some of it cannot be read.
        MissingDependencyError: A file needs a library that is not installed.
    """
    notes = Notes(path)
    files = row_files(path, notes)
    found = dict(zip(files, gather(files, lambda file: read_as(file, layouts, columns)), strict=True))
    parts = {file: part for file, part in found.items() if part is not None}
    seen = dict(zip(parts, gather(parts, lambda file: _seen(parts[file])), strict=True))
    for file in (file for file in files if file not in parts):
        notes.add("left out, a file without a row", file)
    for file in (file for file, one in seen.items() if not one.with_words):
        notes.add("left out, a file without a word", file)
    for file in (file for file, one in seen.items() if one.with_words and one.without):
        notes.add("left out, rows without a word to learn", file)
    if not any(one.with_words for one in seen.values()):
        raise DataError("no text in the data", files)
    source = Source(
        path,
        {name_of(file, path): content_key(file) for file in files},
        [*parts.values()],
        notes.sentences(),
        sum(one.with_words for one in seen.values()),
        all(one.is_text for one in seen.values()),
    )
    return replace(source, notes=[*source.notes, *(f"read as {sentence}" for sentence in source.layouts)])


@dataclass
class _Seen:
    """Of a file how many rows have a word to learn, how many have none, and whether those that have are documents."""

    with_words: int = 0
    without: int = 0
    is_text: bool = True


def _seen(part: Read[Any]) -> _Seen:
    found, faults = _Seen(), Faults()
    for said, row in part.tried():
        if isinstance(said, RowError):
            faults.add(said)
        elif _has_words(said):
            found.with_words += not row.before
            found.is_text = found.is_text and isinstance(said, Document)
        else:
            found.without += 1
    faults.check()
    return found


def _has_words(said: Any) -> bool:
    if isinstance(said, Document):
        return bool(said.text.strip()) or bool(said.before) or bool(said.after)
    return not isinstance(said, Exchange) or bool(said.completion.strip())


def rendered(
    source: Source, template: Template | None, model: str, *, last: bool = False
) -> Iterator[tuple[int, Rendered]]:
    """What each row is as text, with its number; more than one where a template writes earlier answers otherwise.

    Args:
        source: The rows.
        template: Of conversations; without one, a prompt and its completion follow each other as they are.
        model: Whose template it is, for errors.
        last: Of each conversation only the last answer is learnt.

    Raises:
        ConfigError: There are conversations and no template.
        RowError: Naming all rows that the template does not take.
    """
    faults = Faults()
    number = -1
    for said, row in source:
        number += not row.before
        if template is None and isinstance(said, Conversation):
            raise ConfigError(
                [
                    f"options.chat_template: the tokenizer of {model} has no chat template, and the data holds "
                    f"conversations. Name a file of one (such as that of the model's chat version), or {TURNS} for a "
                    f"simple one; {PLAIN} serves prompts and completions alone"
                ],
                "run",
            )
        try:
            found = _rendered(said, row, template, last=last)
        except RowError as error:
            faults.add(error)
            continue
        for one in found:
            yield number, one
    faults.check()


def _rendered(said: Said, row: Row, template: Template | None, *, last: bool) -> list[Rendered]:
    if isinstance(said, Document):
        learnt = [(0, len(said.text))]
        return [Rendered(said.text, learnt, framed=True, whole=True, before=said.before, after=said.after)]
    if template is None:
        assert isinstance(said, Exchange)
        return [said.plain()]
    try:
        conversation = said.conversation() if isinstance(said, Exchange) else said
        return template.answers(conversation, conversation.learnt(last=last))
    except ValueError as error:
        raise row.error(str(error)) from error


def files_of(source: Source, validation: Source | None) -> dict[str, str]:
    """Name -> `content_key` of all that is trained on or measured with."""
    measured = validation.files if validation is not None else {}
    return {**source.files, **{f"validation/{name}": key for name, key in measured.items()}}
