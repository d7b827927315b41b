"""From what was read to rows of tokens, in training and held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from adapterkit.errors import DataError
from adapterkit.training.config import RunConfig
from adapterkit.training.language.corpus import Source, files_of, rendered, stops
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.options import Reading
from adapterkit.training.language.packing import Lines, Packing, joined, packed
from adapterkit.training.language.templates import Template
from adapterkit.training.language.tokens import Encoded, Encoder, end_marks
from adapterkit.training.order import derive_seed

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Examples:
    """What a run on language trains on, and measures with.

    Attributes:
        training: The rows of batches.
        held_out: Examples to measure with.
        packing: How they are in rows.
        files: See `DataRecord`.
        is_text: Whether all of it is documents.
        facts, notes: See `DataRecord`.
    """

    training: Lines
    held_out: Sequence[Encoded]
    packing: Packing
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    is_text: bool = False
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: Sequence[str] = ()


def make_examples(
    source: Source,
    validation: Source | None,
    template: Template | None,
    encoder: Encoder,
    options: Reading,
    packing: Packing | None,
    config: RunConfig,
) -> Examples:
    """Makes text of the rows, tokens of the text, examples that fit of the tokens, and rows of these.

    Args:
        source: To train on.
        validation: To measure with; None holds a share of the source out.
        template: Of conversations.
        encoder: Makes tokens.
        options: Which examples fit, and what is held out.
        packing: How examples are in rows; None joins texts.
        config: The run.

    Raises:
        DataError: There is too little, or the chat template does not take it.
        ConfigError: There is no chat template, and it is needed.
    """
    found = [_encoded(one, encoder, template, config.model) for one in (source, validation) if one is not None]
    facts, notes = _facts(source, found[0]), _notes(source, found[0], template, encoder)
    files = files_of(source, validation)
    packing = packing or ("joined" if source.is_text else "rows")
    if packing == "joined":
        training, held_out = _blocks(found, options, source)
        facts["blocks"] = f"{len(training)} of {options.block_size} tokens, and {len(held_out)} to measure with"
        rows = [[number] for number in range(len(training))]
        return Examples(Lines(training, rows), held_out, packing, files, source.is_text, facts, notes)
    training, measured = (
        found if validation is not None else split_rows(found[0], options.validation_fraction, config.seed)
    )
    fitting = Fitting(options.block_size, options.too_long)
    examples, held_out = (fitting([one for row in rows for one in row]) for rows in (training, measured))
    if not examples:
        raise DataError(
            f"data {source.path} has nothing to learn in the first {options.block_size} tokens of its rows; raise "
            "options.block_size"
        )
    rows = [[number] for number in range(len(examples))]
    if packing == "documents":
        rows = packed([len(one) for one in examples], options.block_size)
        facts["rows of batches"] = f"{len(rows)} of at most {options.block_size} tokens"
    facts["examples"] = f"{len(examples)}, and {len(held_out)} to measure with"
    notes += fitting.notes(sum(map(len, found[0])))
    return Examples(Lines(examples, rows), held_out, packing, files, source.is_text, facts, notes)


def _facts(source: Source, rows: Sequence[list[Encoded]]) -> dict[str, str]:
    examples = [one for row in rows for one in row]
    learnt, longest = sum(int(one.learnt.sum()) for one in examples), max(map(len, examples))
    return {
        "rows": f"{len(rows)}, {'; '.join(source.read.layouts)}",
        "tokens": f"{sum(map(len, examples))}, of which {learnt} are learnt",
        "longest": f"{longest} tokens",
    }


def _notes(source: Source, rows: Sequence[list[Encoded]], template: Template | None, encoder: Encoder) -> list[str]:
    examples = [one for row in rows for one in row]
    notes = [*source.notes]
    if template is not None:
        notes += stops([one for one in examples if not one.whole], end_marks(encoder.tokenizer))
    if encoder.shared:
        notes.append(
            f"answers that share their first token with what is before it, which is not learnt: {encoder.shared}"
        )
    if more := len(examples) - len(rows):
        notes.append(f"the template writes earlier answers otherwise than the last: {more} more examples than rows")
    return notes


def _encoded(source: Source, encoder: Encoder, template: Template | None, model: str) -> list[list[Encoded]]:
    texts = rendered(source.read, template, model, last=encoder.learn == "last")
    encoded = encoder(one for row in texts for one in row)
    return [[next(encoded) for _ in row] for row in texts]


def split_rows(rows: Sequence[_Row], share: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    """The rows to train on and those that are held out, at least one of either; none where the share is 0.

    Raises:
        DataError: There is one row.
    """
    if not share:
        return list(rows), []
    if len(rows) < 2:
        raise DataError("there is one row; two are needed, one to train and one to measure. Give options.validation")
    count = min(max(round(len(rows) * share), 1), len(rows) - 1)
    order = sorted(range(len(rows)), key=lambda number: derive_seed(seed, "held out", number))
    chosen = frozenset(order[:count])
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def _blocks(
    found: Sequence[list[list[Encoded]]], options: Reading, source: Source
) -> tuple[list[Encoded], list[Encoded]]:
    """Everything joined and cut into blocks, the last of which are held out."""
    parts = [joined([one for row in rows for one in row], options.block_size) for rows in found]
    blocks, share = parts[0], options.validation_fraction
    count = max(1, round(len(blocks) * share)) if share and len(parts) == 1 else 0
    if len(blocks) < 1 + bool(count):
        raise DataError(
            f"data {source.path} fills {len(blocks)} block of {options.block_size} tokens; two are "
            "needed, one to train and one to measure. Lower options.block_size"
        )
    training, held_out = (blocks[: len(blocks) - count], blocks[len(blocks) - count :])
    return training, held_out if len(parts) == 1 else parts[1]
