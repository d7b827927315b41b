"""From what was read to rows of tokens, in training and held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.config import RunConfig
from adapterkit.training.language.conversations import Rendered
from adapterkit.training.language.corpus import Source, files_of, rendered
from adapterkit.training.language.encoded import Counts, Stretches, Tokens, blocks, fitted, held_out, put
from adapterkit.training.language.lengths import Fitting
from adapterkit.training.language.options import Reading
from adapterkit.training.language.packing import Lines, Packing, Rows, packed
from adapterkit.training.language.templates import Template
from adapterkit.training.language.token_cache import TokenCache, identity_of_tokenizer
from adapterkit.training.language.tokens import Encoded, Encoder, end_marks


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
        options: Which examples fit, what is held out, and where tokens are kept.
        packing: How examples are in rows; None joins texts.
        config: The run.

    Raises:
        DataError: There is too little, or the chat template does not take it.
        ConfigError: There is no chat template, and it is needed.
    """
    cache = cache_of(options, config)
    found = [_encoded(one, encoder, template, config.model, cache) for one in (source, validation) if one is not None]
    facts, notes = _facts(source, found[0].counts), _notes(source, found, template, encoder)
    files = files_of(source, validation)
    packing = packing or ("joined" if source.is_text else "rows")
    if packing == "joined":
        training, measured = _blocks(found, options, source)
        facts["blocks"] = f"{len(training)} of {options.block_size} tokens, and {len(measured)} to measure with"
        lines = Lines(training, Rows.single(len(training)))
        return Examples(lines, measured, packing, files, source.is_text, facts, [*notes, *cache.notes])
    fitting = Fitting(options.block_size, options.too_long)
    if validation is not None:
        examples, measured = (fitted(one, None, fitting) for one in found)
    else:
        apart = held_out(source.rows, options.validation_fraction, config.seed)
        examples, measured = (fitted(found[0], rows, fitting) for rows in (~apart, apart))
    if not len(examples):
        raise DataError(
            f"data {source.path} has nothing to learn in the first {options.block_size} tokens of its rows; raise "
            "options.block_size"
        )
    rows = Rows.single(len(examples))
    if packing == "documents":
        rows = packed(examples.lengths, options.block_size)
        facts["rows of batches"] = f"{len(rows)} of at most {options.block_size} tokens"
    facts["examples"] = f"{len(examples)}, and {len(measured)} to measure with"
    notes += [*fitting.notes(found[0].counts.examples), *cache.notes]
    return Examples(Lines(examples, rows), measured, packing, files, source.is_text, facts, notes)


def cache_of(options: Reading, config: RunConfig) -> TokenCache:
    """Where the tokens of a run are kept.

    Raises:
        ConfigError: That is among the data.
    """
    if options.cache is None:
        return TokenCache(None, Path(config.output))
    folder = Path(options.cache)
    for data in (Path(one) for one in (config.data, options.validation) if one is not None):
        if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
            told = f"{folder} lies in the data folder {data}, where what it keeps would be data; choose another one"
            raise ConfigError([f"options.cache: {told}"], "run")
    return TokenCache(folder, Path(config.output))


def _facts(source: Source, counts: Counts) -> dict[str, str]:
    return {
        "rows": f"{source.rows}, {'; '.join(source.layouts)}",
        "tokens": f"{counts.tokens}, of which {counts.learnt} are learnt",
        "longest": f"{counts.longest} tokens",
    }


def _notes(source: Source, found: Sequence[Tokens], template: Template | None, encoder: Encoder) -> list[str]:
    notes, counts, ends = [*source.notes], found[0].counts, end_marks(encoder.tokenizer)
    if template is not None and ends and counts.endless:
        notes.append(f"answers without the token {ends[0]}, at which generation ends: {counts.endless} examples")
    if shared := sum(one.counts.shared for one in found):
        notes.append(f"answers that share their first token with what is before it, which is not learnt: {shared}")
    if (more := counts.examples - source.rows) > 0:
        notes.append(f"the template writes earlier answers otherwise than the last: {more} more examples than rows")
    return notes


def _encoded(source: Source, encoder: Encoder, template: Template | None, model: str, cache: TokenCache) -> Tokens:
    def texts() -> Iterator[tuple[int, Rendered, bool]]:
        for row, text in rendered(source, template, model, last=encoder.learn == "last"):
            yield row, text, text.whole

    return encoded(source, template, encoder, cache, texts(), "answers")


def encoded(
    source: Source,
    template: Template | None,
    encoder: Encoder,
    cache: TokenCache,
    texts: Iterable[tuple[int, Rendered, bool]],
    kind: str,
) -> Tokens:
    """The texts of a source as tokens, which follow from it, template, tokenizer, what is learnt, and their kind."""
    parts: tuple[object, ...] = ()
    if cache.folder is not None:
        told = None if template is None else template.text
        parts = (kind, *source.identity, told, encoder.learn, identity_of_tokenizer(encoder.tokenizer))
    shelf, counts = cache.get(parts, lambda shelf: put(texts, encoder, shelf))
    return Tokens(shelf, Counts(**counts))


def _blocks(found: Sequence[Tokens], options: Reading, source: Source) -> tuple[Stretches, Stretches]:
    """Everything joined and cut into blocks, the last of which are held out."""
    parts = [blocks(one, options.block_size) for one in found]
    whole, share = parts[0], options.validation_fraction
    count = max(1, round(len(whole) * share)) if share and len(parts) == 1 else 0
    if len(whole) < 1 + bool(count):
        raise DataError(
            f"data {source.path} fills {len(whole)} block of {options.block_size} tokens; two are "
            "needed, one to train and one to measure. Lower options.block_size"
        )
    training, measured = whole[: len(whole) - count], whole[len(whole) - count :]
    return training, measured if len(parts) == 1 else parts[1]
