"""Which columns of a file say what: found by their names, or told by the user."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from adapterkit.errors import DataError, RowError
from adapterkit.training.data_files import listed
from adapterkit.training.faults import Faults
from adapterkit.training.language.conversations import (
    ASSISTANT,
    Conversation,
    Document,
    Exchange,
    asked,
    conversation_of,
)
from adapterkit.training.language.rows import Row, rows_in

_Found = TypeVar("_Found")
Part = Mapping[str, Any]
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Layout(Generic[_Found]):
    """One way in which rows say something.

    Attributes:
        name: For the user.
        needed: What a row must have -> the names of columns that have it.
        make: From those values of a row.
        optional: What it may have.
    """

    name: str
    needed: Mapping[str, Sequence[str]]
    make: Callable[[Part, Row], _Found]
    optional: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])

    def columns(self, present: Iterable[str], told: Columns) -> dict[str, str] | None:
        """What -> the column that has it; None where something is lacking, or `told` names what is not used here."""
        present = list(present)
        uses = {**self.needed, **self.optional}
        if not set(told) <= set(uses):
            return None
        found = {what: next((n for n in _names(what, names, told) if n in present), "") for what, names in uses.items()}
        lacks = any(not found[what] for what in (*self.needed, *told))
        return None if lacks else {what: column for what, column in found.items() if column}


def _names(what: str, names: Sequence[str], told: Columns) -> Sequence[str]:
    return (told[what],) if what in told else names


@dataclass(frozen=True)
class Read(Generic[_Found]):
    """The rows of a file, as a layout reads them. They are read each time they are asked for.

    Attributes:
        file: It.
        layout: How its rows say something.
        columns: What -> the column that has it.
        present: All columns.
    """

    file: Path
    layout: Layout[_Found]
    columns: Columns
    present: Sequence[str]

    @property
    def sentence(self) -> str:
        """The columns that are read, and those that are not."""
        return _sentence(self.layout.name, self.columns, self.present)

    def __iter__(self) -> Iterator[tuple[_Found, Row]]:
        """What each row says.

        Raises:
            DataError: A row lacks something.
        """
        for said, row in self.tried():
            if isinstance(said, RowError):
                raise said
            yield said, row

    def tried(self) -> Iterator[tuple[_Found | RowError, Row]]:
        """What each row says, or what is wrong with it."""
        for row in rows_in(self.file):
            try:
                said = self._made(row)
            except RowError as error:
                yield error, row
            else:
                yield said, row

    def _made(self, row: Row) -> _Found:
        if row.fault is not None:
            raise row.fault
        return self.layout.make(_part(row, self.columns, self.layout), row)


def read_as(file: Path, layouts: Sequence[Layout[_Found]], told: Columns) -> Read[_Found] | None:
    """Finds the first layout that a file's columns have; None where it has no row.

    Args:
        file: It is read once for that.
        layouts: The more telling first.
        told: What -> the column that has it, where the user has said so.

    Raises:
        DataError: Its columns are none of the layouts', or it cannot be read.
    """
    rows, present = 0, dict[str, None]()
    faults = Faults()
    for row in rows_in(file):
        if row.fault is not None:  # which is told with all others, when rows are looked at
            faults.add(row.fault)
            continue
        rows += 1
        present.update(dict.fromkeys(row.values))
    if not rows:
        faults.check()
        return None
    for layout in layouts:
        if (columns := layout.columns(present, told)) is not None:
            return Read(file, layout, columns, list(present))
    faults.check()
    ways = "; ".join(f"{one.name}: {', '.join(one.needed)}" for one in layouts)
    raise DataError(
        f"has the columns {listed(present)}, and none of what is read ({ways}). Say which is which, such as "
        "options.columns={prompt: question, completion: answer}",
        [file],
    )


def _sentence(name: str, columns: Columns, present: Iterable[str]) -> str:
    read = ", ".join(what if what == column else f"{what} from {column}" for what, column in columns.items())
    unread = [column for column in present if column not in columns.values()]
    return f"{name} ({read}{f'; not read: {listed(unread)}' if unread else ''})"


def _part(row: Row, columns: Columns, layout: Layout[Any]) -> dict[str, Any]:
    values = {what: row.values.get(column) for what, column in columns.items()}
    for what in layout.needed:
        if values[what] is None:
            raise row.error(f"has no {columns[what]!r}")
    return values


def text_of(value: Any, what: str, row: Row) -> str:
    """A text.

    Raises:
        DataError: It is something else.
    """
    if isinstance(value, str):
        return value
    raise row.error(f"must have a text as {what!r}, not {value!r:.60}")


def _optional(part: Part, what: str, row: Row) -> str:
    value = part.get(what)
    return text_of(value, what, row) if value is not None else ""


def listed_in(value: Any, row: Row) -> Any:
    """A list, also where a table's cell holds it as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise row.error(f"holds a list that is no JSON ({error})") from error
    return value


def chat(part: Part, row: Row) -> Conversation:
    """A conversation in which the assistant says something."""
    made = conversation_of(
        listed_in(part["messages"], row),
        row,
        system=_optional(part, "system", row),
        tools=listed_in(part.get("tools"), row),
    )
    if not made.answers:
        raise row.error(f"has no message of the role {ASSISTANT!r}, so that nothing could be learnt from it")
    return made


def _instructions(part: Part, row: Row) -> Conversation:
    instruction, given = text_of(part["instruction"], "instruction", row), _optional(part, "input", row)
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return asked(prompt, text_of(part["output"], "output", row), _optional(part, "system", row))


def _exchange(part: Part, row: Row) -> Exchange | Conversation:
    """TRL's conversational form has lists of messages in both."""
    prompt, completion = part["prompt"], part["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat({"messages": [*prompt, *completion]}, row)
    system = _optional(part, "system", row)
    return Exchange(text_of(prompt, "prompt", row), text_of(completion, "completion", row), system)


def _document(part: Part, row: Row) -> Document:
    return Document(text_of(part["text"], "text", row), row.before, row.after)


PROMPTS = ("prompt", "question", "query")
COMPLETIONS = ("completion", "response", "answer")
_SYSTEM = {"system": ("system", "system_prompt")}

LANGUAGE: tuple[Layout[Document | Exchange | Conversation], ...] = (
    Layout("conversations", {"messages": ("messages", "conversations")}, chat, {**_SYSTEM, "tools": ("tools",)}),
    Layout(
        "instructions",
        {"instruction": ("instruction",), "output": ("output", "response")},
        _instructions,
        {"input": ("input", "context"), **_SYSTEM},
    ),
    Layout("prompts and completions", {"prompt": PROMPTS, "completion": COMPLETIONS}, _exchange, _SYSTEM),
    Layout("texts", {"text": ("text",)}, _document),
)
"""What a language model learns from."""
