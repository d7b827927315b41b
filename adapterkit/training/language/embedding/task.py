"""The task `text-embedding`: texts that belong together become alike, with transformers' encoders and decoders."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from adapterkit.errors import DataError
from adapterkit.training.data_record import DataRecord
from adapterkit.training.export.libraries import peft_reader
from adapterkit.training.language.caches import uncached
from adapterkit.training.language.corpus import Source, files_of, read_source
from adapterkit.training.language.embedding.examples import RELATED, Group, Groups, belonging, collated, encode
from adapterkit.training.language.embedding.objectives import (
    Pooling,
    contrast,
    likeness,
    pooled,
    rank_correlation,
    retrieval,
)
from adapterkit.training.language.embedding.sentence_files import sentence_pooling, write_sentence_files
from adapterkit.training.language.encoded import held_out
from adapterkit.training.language.examples import cache_of
from adapterkit.training.language.generation import pad_of
from adapterkit.training.language.options import Reading, check_length
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.token_cache import TokenCache, identity_of_tokenizer
from adapterkit.training.language.writing import write_language_model
from adapterkit.training.loading import checkpoint_activations, load_encoder, load_tokenizer, outline_encoder
from adapterkit.training.parts import to_device
from adapterkit.training.task import OtherReader, Setting, Task


class Options(Reading):
    """The keys under `options`.

    The columns of a file are `anchor` (or `query`) and `positive` (or `passage`), with a `negative` where there is one;
    or two texts and a `score` from 0 to 1.

    Attributes:
        pooling: What of the tokens is the embedding: their `mean`, the first (`cls`) or the `last`. By default what the
            model's own files say (`1_Pooling`), or else the mean.
        temperature: Cosines are divided by it before they are compared.
    """

    pooling: Pooling | None = None
    temperature: float = Field(0.05, gt=0)


class TextEmbeddingTask(Task):
    """An anchor's own text against those of all other rows of the batch, so that large batches teach more."""

    Options = Options
    options: Options
    larger_is_better = frozenset({"accuracy", "mrr", "correlation"})
    free_options = frozenset({"cache"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads and tokenizes everything."""
        training, held_out = self.split
        facts = {
            "rows": f"{self.source.rows}, {'; '.join(self.source.layouts)}",
            "longest": f"{self.longest} tokens",
            "examples": f"{len(training)}, and {len(held_out)} to measure with",
            "pooling": self.pooling,
        }
        cut = [f"cut after {self.options.block_size} tokens: {self.cut} texts"] if self.cut else []
        notes = [*self.source.notes, *cut, *self.cache.notes]
        return DataRecord(files_of(self.source, self.validation), notes=notes, facts=facts)

    def outline(self) -> nn.Module:
        """The model's shape."""
        outline = outline_encoder(self.config.model)
        check_length(outline, self.options.block_size)
        return outline

    def load_model(self) -> nn.Module:
        """The model without a head."""
        self.model = load_encoder(self.config.model, self.config.dtype)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Groups:
        """The rows to train on."""
        self.device = setting.device
        return self.split[0]

    def collate(self, items: Sequence[Group]) -> dict[str, Any]:
        """See `collated`."""
        return collated(items, pad_of(self.tokenizer))

    def amount(self, batch: Mapping[str, Any]) -> tuple[int, str]:
        """Its tokens, without padding."""
        return int(batch["attention_mask"].sum()), "tokens"

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The anchors' own texts against all others; or, where there are scores, the squared difference to them."""
        rows = len(batch["same"])
        embedded = self.embed(batch)
        anchors, others = embedded[:rows], embedded[rows:]
        if batch["scores"] is not None:
            return likeness(anchors, others, batch["scores"])
        return contrast(anchors, others, batch["same"], self.options.temperature)

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of length 1: [texts, features]."""
        model: Any = self.model
        told = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return pooled(model(**told, **uncached(model)).last_hidden_state, batch["attention_mask"], self.pooling)

    def checkpoint_activations(self) -> None:
        """As transformers does it."""
        checkpoint_activations(self.model)

    def evaluate(self) -> Mapping[str, float]:
        """How well held-out texts find their own among all of them; of scores the rank correlation."""
        held_out = self.split[1]
        if not held_out:
            return {}
        size, parts = self.config.batch_size, []
        for start in range(0, len(held_out), size):
            batch = self.collate(held_out[start : start + size])
            rows = len(batch["same"])
            embedded = self.embed(to_device(batch, self.device)).double().cpu()
            parts.append((embedded[:rows], embedded[rows : 2 * rows]))
        anchors, positives = (torch.cat(some) for some in zip(*parts, strict=True))
        if held_out[0].score is not None:
            scores = torch.tensor([one.score for one in held_out])
            return {"correlation": rank_correlation((anchors * positives).sum(-1), scores)}
        return retrieval(anchors, positives, *belonging(held_out))

    def measures(self) -> Collection[str]:
        """See `evaluate`."""
        held_out = self.split[1]
        if not held_out:
            return ()
        return ("accuracy", "mrr") if held_out[0].score is None else ("correlation",)

    def exports(self) -> Sequence[str]:
        """A folder of PEFT."""
        return ("peft",)

    def probe(self) -> Tensor:
        """The embedding [1, features] of a few tokens."""
        return _probed(self.model, self.pooling)

    def write_model(self, folder: Path) -> Tensor:
        """The model, its tokenizer and its pooling, as transformers and sentence-transformers load them."""
        model: Any = self.model
        write_language_model(model, self.tokenizer, folder)
        write_sentence_files(folder, self.pooling, model.config.get_text_config().hidden_size, self.config.model)
        return _probed(load_encoder(str(folder), self.config.dtype).to(model.device).eval(), self.pooling)

    def other_reader(self, format: str) -> OtherReader | None:
        """PEFT reads its own."""
        return peft_reader(self.model) if format == "peft" else None

    @functools.cached_property
    def pooling(self) -> Pooling:
        """That of the options, or of the model's own files."""
        return self.options.pooling or sentence_pooling(self.config.model) or "mean"

    @functools.cached_property
    def source(self) -> Source:
        """What is trained on, read."""
        return read_source(Path(self.config.data), self.options.columns, RELATED)

    @functools.cached_property
    def validation(self) -> Source | None:
        """What is measured with, where it is a file of its own."""
        told = self.options.validation
        return read_source(Path(told), self.options.columns, RELATED) if told else None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.config.model)

    @functools.cached_property
    def cache(self) -> TokenCache:
        """Where tokens are kept."""
        return cache_of(self.options, self.config)

    @functools.cached_property
    def split(self) -> tuple[Groups, Groups]:
        """The rows to train on, and those that are held out."""
        sources = [one for one in (self.source, self.validation) if one is not None]
        found = [self._encoded(one) for one in sources]
        if sum(record["scored"] for _, record in found) not in (0, sum(len(shelf) for shelf, _ in found)):
            raise DataError("some pairs have a score, and some have none; put them in runs of their own")
        self.cut = sum(record["cut"] for _, record in found)
        self.longest = found[0][1]["longest"]
        if self.validation is not None:
            return Groups(found[0][0]), Groups(found[1][0])
        apart = held_out(self.source.rows, self.options.validation_fraction, self.config.seed)
        return Groups(found[0][0], np.flatnonzero(~apart)), Groups(found[0][0], np.flatnonzero(apart))

    def _encoded(self, source: Source) -> tuple[Shelf, Mapping[str, Any]]:
        limit, known = self.options.block_size, self.cache.folder is not None
        parts = (*source.identity, limit, identity_of_tokenizer(self.tokenizer)) if known else ()
        said = (one for one, _ in source)
        return self.cache.get(parts, lambda shelf: encode(said, self.tokenizer, limit, shelf))


def _probed(model: Any, pooling: Pooling) -> Tensor:
    tokens = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    return pooled(model(input_ids=tokens).last_hidden_state, torch.ones_like(tokens), pooling).cpu()
