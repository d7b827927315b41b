"""Preferences as tokens: pairs of answers, or answers that are judged beside answers to other prompts."""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adapterkit.errors import ConfigError, DataError, RowError
from adapterkit.training.config import RunConfig
from adapterkit.training.faults import Faults
from adapterkit.training.language.conversations import Rendered
from adapterkit.training.language.corpus import Source, files_of
from adapterkit.training.language.encoded import Stretches, Tokens, as_table, held_out
from adapterkit.training.language.examples import cache_of, encoded
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.options import Reading
from adapterkit.training.language.packing import Line, collated, line_of
from adapterkit.training.language.preference.judgements import Judged
from adapterkit.training.language.templates import Template
from adapterkit.training.language.token_cache import TokenCache
from adapterkit.training.language.tokens import Encoded, Encoder
from adapterkit.training.order import Draw


class Pairs:
    """The better answer and the other, by number; nothing about them is random."""

    def __init__(self, chosen: Sequence[Encoded], rejected: Sequence[Encoded]) -> None:
        self.chosen, self.rejected = chosen, rejected

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draw: Draw) -> tuple[Line, Line]:
        return self.item(draw.index)

    def item(self, number: int) -> tuple[Line, Line]:
        """A pair by its number."""
        return line_of([self.chosen[number]]), line_of([self.rejected[number]])

    @staticmethod
    def collate(items: Sequence[tuple[Line, Line]], pad: int) -> dict[str, Any]:
        """`answers`, a batch for a causal language model: the better ones, then the others."""
        lines = [chosen for chosen, _ in items] + [rejected for _, rejected in items]
        return {"answers": collated(lines, pad, apart=False)}


class Judgements:
    """An answer, what answers the prompt of the next one, and whether the answer is good."""

    def __init__(self, answers: Sequence[Encoded], good: np.ndarray) -> None:
        self.answers, self.good = answers, good

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, draw: Draw) -> tuple[Line, Line, bool]:
        return self.item(draw.index)

    def item(self, number: int) -> tuple[Line, Line, bool]:
        """An answer by its number."""
        own, other = self.answers[number], self.answers[(number + 1) % len(self.answers)]
        return line_of([own]), line_of([_answered_by(own, other)]), bool(self.good[number])

    @staticmethod
    def collate(items: Sequence[tuple[Line, Line, bool]], pad: int) -> dict[str, Any]:
        """`answers` and `others`, batches for a causal language model, and `good` [answers]."""
        return {
            "answers": collated([own for own, _, _ in items], pad, apart=False),
            "others": collated([other for _, other, _ in items], pad, apart=False),
            "good": torch.tensor([good for _, _, good in items]),
        }


def _answered_by(own: Encoded, other: Encoded) -> Encoded:
    """The prompt of one with the answer of another, no longer than either lets it be."""
    prompt, answer = own.part(0, _begin(own)), other.part(_begin(other), len(other))
    both = Encoded(torch.cat([prompt.tokens, answer.tokens]), torch.cat([prompt.learnt, answer.learnt]))
    return both.part(0, max(len(own), len(other)))


def _begin(one: Encoded) -> int:
    return int(one.learnt.int().argmax())


@dataclass(frozen=True)
class Preferences:
    """What a run trains on, and measures with.

    Attributes:
        training: A data set.
        held_out: Like it; empty where nothing is held out.
        files, facts, notes: See `DataRecord`.
    """

    training: Pairs | Judgements
    held_out: Pairs | Judgements
    files: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: Sequence[str] = ()


def make_preferences(
    source: Source,
    validation: Source | None,
    template: Template | None,
    encoder: Encoder,
    options: Reading,
    config: RunConfig,
    *,
    paired: bool,
) -> Preferences:
    """Tokens of the answers, made to fit.

    Args:
        source, validation: As read; without a validation a share of the source is held out.
        template: Of conversations.
        encoder: Makes tokens.
        options: Which examples fit, and what is held out.
        config: The run.
        paired: Whether the loss is of pairs; otherwise both answers of a pair are judged ones.

    Raises:
        DataError: There are no pairs, or nothing is left of them.
        ConfigError: Answers cannot be split.
    """
    if options.too_long == "split":
        raise ConfigError(["options.too_long: an answer cannot be split; use cut, or leave out"], "run")
    cache, counts = cache_of(options, config), Counter[str]()
    sources = [one for one in (source, validation) if one is not None]
    found = [_encoded(one, template, encoder, cache, paired=paired) for one in sources]
    fitting = Fitting(options.block_size, options.too_long or "cut")
    fit = functools.partial(_pairs if paired else _judgements, fitting=fitting, counts=counts)
    if validation is not None:
        kept, measured = (fit(one, np.ones(rows.rows, bool)) for one, rows in zip(found, sources, strict=True))
    else:
        apart = held_out(source.rows, options.validation_fraction, config.seed)
        kept, measured = (fit(found[0], rows) for rows in (~apart, apart))
    told = found[0].counts
    notes = [*source.notes, *fitting.notes(told.examples), *(f"{why}: {count}" for why, count in counts.items())]
    if not len(kept):
        raise DataError(f"data {source.path} has nothing to learn in {options.block_size} tokens: {'; '.join(notes)}")
    facts = {
        "rows": f"{source.rows}, {'; '.join(source.layouts)}",
        "tokens": str(told.tokens),
        "longest": f"{told.longest} tokens",
        "examples": f"{len(kept)}, and {len(measured)} to measure with",
    }
    return Preferences(kept, measured, files_of(source, validation), facts, [*notes, *cache.notes])


def _encoded(source: Source, template: Template | None, encoder: Encoder, cache: TokenCache, *, paired: bool) -> Tokens:
    """The answers of each row, marked where they are good."""

    def texts() -> Iterator[tuple[int, Rendered, bool]]:
        faults = Faults()
        for number, (said, row) in enumerate(source):
            if isinstance(said, Judged) and paired:
                raise row.error("is one answer that is judged; such rows are for options.objective=kto")
            judged = isinstance(said, Judged)
            answers = [(said.answer, said.good)] if judged else [(said.chosen, True), (said.rejected, False)]
            try:
                found = [(answer.rendered(template, row), good) for answer, good in answers]
            except RowError as error:
                faults.add(error)
                continue
            for answer, good in found:
                yield number, answer, good
        faults.check()

    return encoded(source, template, encoder, cache, texts(), "pairs" if paired else "judgements")


def _pairs(tokens: Tokens, rows: np.ndarray, fitting: Fitting, counts: Counter[str]) -> Pairs:
    """Of these rows those whose answers fit and differ."""
    found, row_of = array("q"), tokens.rows
    for place in range(0, len(tokens), 2):
        if not rows[row_of[place]]:
            continue
        both = tokens.example(place), tokens.example(place + 1)
        if both[0].tokens.tolist() == both[1].tokens.tolist():
            counts["left out, pairs of one answer"] += 1
            continue
        parts = [fitting(len(one), one.part) for one in both]
        if all(parts):
            for number, ((start, end), *_) in enumerate(parts, place):
                begin, _ = tokens.shelf.span(number)
                found.extend((begin + start, begin + end))
    spans = as_table(found, 4)
    return Pairs(Stretches(tokens, spans[:, :2]), Stretches(tokens, spans[:, 2:]))


def _judgements(tokens: Tokens, rows: np.ndarray, fitting: Fitting, counts: Counter[str]) -> Judgements:
    """Of these rows the answers that fit."""
    found, row_of, good = array("q"), tokens.rows, tokens.marks
    for place in range(len(tokens)):
        if rows[row_of[place]]:
            begin, _ = tokens.shelf.span(place)
            one = tokens.example(place)
            for start, end in fitting(len(one), one.part):
                found.extend((begin + start, begin + end, int(good[place])))
    spans = as_table(found, 3)
    return Judgements(Stretches(tokens, spans[:, :2]), spans[:, 2].astype(bool))
