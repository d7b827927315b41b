"""The data of a run on language: read, made into text by the template, tokenized, made to fit, and told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.data_files import Notes, content_key, name_of
from adapterkit.training.language.conversations import Conversation, Document, Exchange, Rendered
from adapterkit.training.language.layouts import LANGUAGE, Columns, Layout, Read, read_as
from adapterkit.training.language.rows import Row, read_rows, row_files
from adapterkit.training.language.templates import PLAIN, TURNS, Template
from adapterkit.training.language.tokens import Encoded

Said = Document | Exchange | Conversation


@dataclass(frozen=True)
class Source:
    """A file or folder that was read.

    Attributes:
        path: The file or folder.
        files: Name -> `content_key`.
        read: What its rows say.
        notes: What was left out, and in which columns what was found.
    """

    path: Path
    files: dict[str, str]
    read: Read[Any]
    notes: Sequence[str]

    @property
    def is_text(self) -> bool:
        """Whether all rows are documents."""
        return all(isinstance(one, Document) for one in self.read.found)


def read_source(path: Path, columns: Columns, layouts: Sequence[Layout[Any]] = LANGUAGE) -> Source:
    """Reads a file or a folder.

    Raises:
        DataError: There is nothing to be learnt, or some of it cannot be read.
        MissingDependencyError: A file needs a library that is not installed.
    """
    notes = Notes(path)
    files = row_files(path, notes)
    rows = read_rows(files)
    empty = set(files) - {row.file for row in rows}
    for file in sorted(empty):
        notes.add("left out, a file without a row", file)
    kept = _with_words(read_as(rows, layouts, columns), notes) if rows else None
    if kept is None or not kept.found:
        raise DataError("no text in the data", files)
    keys = {name_of(file, path): content_key(file) for file in files}
    return Source(path, keys, kept, [*notes.sentences(), *(f"read as {sentence}" for sentence in kept.layouts)])


def _with_words(read: Read[Any], notes: Notes) -> Read[Any]:
    """Without rows of which nothing could be learnt."""
    kept: list[tuple[Any, Row]] = []
    spoken: set[Path] = set()
    for said, row in zip(read.found, read.rows, strict=True):
        if _has_words(said):
            kept.append((said, row))
            spoken.add(row.file)
    for row in read.rows if len(kept) < len(read.rows) else ():
        if row.file not in spoken:
            notes.add("left out, a file without a word", row.file)
    for said, row in zip(read.found, read.rows, strict=True):
        if row.file in spoken and not _has_words(said):
            notes.add("left out, rows without a word to learn", row.file)
    return Read([said for said, _ in kept], [row for _, row in kept], read.layouts)


def _has_words(said: Any) -> bool:
    if isinstance(said, Document):
        return bool(said.text.strip())
    return not isinstance(said, Exchange) or bool(said.completion.strip())


def rendered(read: Read[Any], template: Template | None, model: str, *, last: bool = False) -> list[list[Rendered]]:
    """What each row is as text; more than one where the template writes earlier answers otherwise than the last.

    Args:
        read: The rows.
        template: Of conversations; without one, a prompt and its completion follow each other as they are.
        model: Whose template it is, for errors.
        last: Of each conversation only the last answer is learnt.

    Raises:
        ConfigError: There are conversations and no template.
        DataError: The template does not take a row.
    """
    if template is None and any(isinstance(said, Conversation) for said in read.found):
        raise ConfigError(
            [
                f"options.chat_template: the tokenizer of {model} has no chat template, and the data holds "
                f"conversations. Name a file of one (such as that of the model's chat version), or {TURNS} for a "
                f"simple one; {PLAIN} serves prompts and completions alone"
            ],
            "run",
        )
    return [_rendered(said, row, template, last=last) for said, row in zip(read.found, read.rows, strict=True)]


def _rendered(said: Said, row: Row, template: Template | None, *, last: bool) -> list[Rendered]:
    if isinstance(said, Document):
        return [Rendered(said.text, [(0, len(said.text))], framed=True, whole=True)]
    if template is None:
        assert isinstance(said, Exchange)
        return [said.plain()]
    try:
        conversation = said.conversation() if isinstance(said, Exchange) else said
        return template.answers(conversation, conversation.learnt(last=last))
    except ValueError as error:
        raise row.error(str(error)) from error


def stops(examples: Sequence[Encoded], ends: Sequence[int]) -> Iterator[str]:
    """A sentence where answers do not end with a token at which generation stops."""
    endless = sum(not set(one.tokens[one.learnt].tolist()) & set(ends) for one in examples)
    if ends and endless:
        yield f"answers without the token {ends[0]}, at which generation ends: {endless} examples"


def files_of(source: Source, validation: Source | None) -> dict[str, str]:
    """Name -> `content_key` of all that is trained on or measured with."""
    measured = validation.files if validation is not None else {}
    return {**source.files, **{f"validation/{name}": key for name, key in measured.items()}}
