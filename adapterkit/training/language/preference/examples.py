"""Preferences as tokens: pairs of answers, or answers that are judged beside answers to other prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.config import RunConfig
from adapterkit.training.language.corpus import Source, files_of
from adapterkit.training.language.examples import split_rows
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.options import Reading
from adapterkit.training.language.packing import Line, collated, line_of
from adapterkit.training.language.preference.judgements import Answer, Judged, Pair
from adapterkit.training.language.templates import Template
from adapterkit.training.language.tokens import Encoded, Encoder
from adapterkit.training.order import Draw

Item = tuple[Encoded, Encoded] | tuple[Encoded, bool]


class Pairs:
    """The better answer and the other; nothing about them is random."""

    def __init__(self, items: Sequence[tuple[Encoded, Encoded]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> tuple[Line, Line]:
        return self.item(draw.index)

    def item(self, number: int) -> tuple[Line, Line]:
        """A pair by its number."""
        chosen, rejected = self.items[number]
        return line_of([chosen]), line_of([rejected])

    @staticmethod
    def collate(items: Sequence[tuple[Line, Line]], pad: int) -> dict[str, Any]:
        """`answers`, a batch for a causal language model: the better ones, then the others."""
        lines = [chosen for chosen, _ in items] + [rejected for _, rejected in items]
        return {"answers": collated(lines, pad, apart=False)}


class Judgements:
    """An answer, what answers the prompt of the next one, and whether the answer is good."""

    def __init__(self, items: Sequence[tuple[Encoded, bool]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> tuple[Line, Line, bool]:
        return self.item(draw.index)

    def item(self, number: int) -> tuple[Line, Line, bool]:
        """An answer by its number."""
        own, good = self.items[number]
        other, _ = self.items[(number + 1) % len(self.items)]
        return line_of([own]), line_of([_answered_by(own, other)]), good

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
    counts: Counter[str] = Counter()
    found = [_rows(one, template, encoder, paired=paired) for one in (source, validation) if one is not None]
    lengths = [len(answer) for row in found[0] for item in row for answer in item if isinstance(answer, Encoded)]
    training, measured = (
        found if validation is not None else split_rows(found[0], options.validation_fraction, config.seed)
    )
    fitting = Fitting(options.block_size, options.too_long or "cut")
    kept, held_out = (
        _fitting([item for row in rows for item in row], fitting, counts) for rows in (training, measured)
    )
    notes = [*source.notes, *fitting.notes(len(lengths)), *(f"{why}: {count}" for why, count in counts.items())]
    if not kept:
        raise DataError(f"data {source.path} has nothing to learn in {options.block_size} tokens: {'; '.join(notes)}")
    facts = {
        "rows": f"{len(found[0])}, {'; '.join(source.read.layouts)}",
        "tokens": str(sum(lengths)),
        "longest": f"{max(lengths)} tokens",
        "examples": f"{len(kept)}, and {len(held_out)} to measure with",
    }
    kind: Any = Pairs if paired else Judgements
    return Preferences(kind(kept), kind(held_out), files_of(source, validation), facts, notes)


def _rows(source: Source, template: Template | None, encoder: Encoder, *, paired: bool) -> list[list[Item]]:
    """The items of each row."""
    answers: list[list[tuple[Answer, bool]]] = []
    for said, row in zip(source.read.found, source.read.rows, strict=True):
        if isinstance(said, Judged):
            if paired:
                raise row.error("is one answer that is judged; such rows are for options.objective=kto")
            answers.append([(said.answer, said.good)])
        else:
            assert isinstance(said, Pair)
            answers.append([(said.chosen, True), (said.rejected, False)])
    rows = zip(answers, source.read.rows, strict=True)
    encoded = encoder(answer.rendered(template, row) for some, row in rows for answer, _ in some)
    found: list[list[Item]] = []
    for some in answers:
        items = [(next(encoded), good) for _, good in some]
        found.append([(items[0][0], items[1][0])] if paired else list(items))
    return found


def _fitting(items: Sequence[Item], fitting: Fitting, counts: Counter[str]) -> list[Item]:
    kept: list[Item] = []
    for first, second in items:
        if isinstance(second, bool):
            kept += [(one, second) for one in fitting([first])]
            continue
        if first.tokens.tolist() == second.tokens.tolist():
            counts["left out, pairs of one answer"] += 1
            continue
        both = [fitting([one]) for one in (first, second)]
        if all(both):
            kept.append((both[0][0], both[1][0]))
    return kept
