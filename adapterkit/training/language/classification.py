"""The task `text-classification`: classes of texts, or of pairs of texts, with transformers' classifiers."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError, RowError
from adapterkit.training.classifiers import heads_of, in_order_of
from adapterkit.training.data_files import listed
from adapterkit.training.data_record import DataRecord
from adapterkit.training.language.caches import uncached
from adapterkit.training.language.corpus import Source, files_of, read_source
from adapterkit.training.language.examples import cache_of
from adapterkit.training.language.generation import pad_of
from adapterkit.training.language.labelled import (
    LABELLED,
    Encoding,
    Texts,
    class_names,
    collated,
    encode,
    scores,
    split_classes,
    unlabelled,
)
from adapterkit.training.language.options import Reading, check_length
from adapterkit.training.language.rows import Row
from adapterkit.training.language.shelf import Shelf
from adapterkit.training.language.token_cache import TokenCache, identity_of_tokenizer
from adapterkit.training.language.unlabelled import Asked, unlabelled_rows
from adapterkit.training.language.writing import write_language_model
from adapterkit.training.loading import (
    checkpoint_activations,
    label_names,
    load_text_classifier,
    load_tokenizer,
    outline_text_classifier,
)
from adapterkit.training.parts import to_device
from adapterkit.training.task import Prediction, Setting, Task

_AT_ONCE = 32  # texts that are classified at a time


class Options(Reading):
    """The keys under `options`.

    The columns of a file are `text` or `sentence`, and `label`; with `text_pair` two texts are classified together.

    Attributes:
        train_head: Give the model a fresh head for these classes, and train it and whatever else of the classifier the
            checkpoint lacks, as parts of the adapter. Otherwise the model must have these classes.
        label_smoothing: The share of the target that is spread over all classes.
    """

    train_head: bool = True
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class TextClassificationTask(Task):
    """Cross entropy on transformers' classifiers of sequences."""

    Options = Options
    options: Options
    larger_is_better = frozenset({"accuracy", "f1"})
    free_options = frozenset({"cache"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads and tokenizes everything."""
        counts = Counter(one.label for one, _ in self.source)
        record = DataRecord(files_of(self.source, self.validation), class_names(counts))
        record = self._numbered(record, before)
        self.classes = list(record.classes)
        training, held_out = self.split
        facts = {
            "rows": f"{self.source.rows}, {'; '.join(self.source.layouts)}",
            "classes": ", ".join(f"{name} {counts[name]}" for name in self.classes),
            "longest": f"{self.longest} tokens",
            "examples": f"{len(training)}, and {len(held_out)} to measure with",
        }
        cut = [f"cut after {self.options.block_size} tokens: {self.cut} texts"] if self.cut else []
        notes = [*record.notes, *self.source.notes, *cut, *self.cache.notes]
        return replace(record, notes=notes, facts=facts)

    def outline(self) -> nn.Module:
        """The classifier's shape."""
        outline = outline_text_classifier(self.config.model, self._fresh)
        check_length(outline, self.options.block_size)
        self.fresh = list(heads_of(outline, self._fresh)) if self._fresh else []
        return outline

    def load_model(self) -> nn.Module:
        """The classifier, with a fresh head if that is asked for."""
        self.model, lacking = load_text_classifier(self.config.model, self.config.dtype, self._fresh)
        heads = heads_of(self.model, self._fresh) if self._fresh else {}
        for head in heads.values():  # transformers keeps one that happens to have as many outputs
            head.reset_parameters()  # type: ignore[operator]
        self.fresh = [*heads, *(path for path in lacking if path not in heads)] if self._fresh else []
        config: Any = self.model.config
        if config.get_text_config().pad_token_id is None:  # decoders look for the last token that is none
            config.get_text_config().pad_token_id = pad_of(self.tokenizer)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Texts:
        """The texts to train on."""
        self.device = setting.device
        if self.fresh:
            setting.tell(
                f"model: no weights for {listed(self.fresh)}, which begin at random and train with the adapter"
            )
        return self.split[0]

    def collate(self, items: Sequence[Encoding]) -> dict[str, Any]:
        """See `collated`."""
        return collated(items, pad_of(self.tokenizer))

    def amount(self, batch: Mapping[str, Any]) -> tuple[int, str]:
        """Its texts."""
        return len(batch["labels"]), "examples"

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropy in float32."""
        logits = self._logits(batch).float()
        return F.cross_entropy(logits, batch["labels"], label_smoothing=self.options.label_smoothing)

    def checkpoint_activations(self) -> None:
        """As transformers does it."""
        checkpoint_activations(self.model)

    def also(self) -> Sequence[AdapterConfig]:
        """The fresh head, and what else of the classifier the checkpoint lacks."""
        return [Trainable(targets=" ".join(f"path:{path}" for path in self.fresh))] if self.fresh else []

    def class_names(self) -> Sequence[str]:
        """Those of the labels."""
        return self.classes

    def recall(self, classes: Sequence[str]) -> None:
        """The classes of a file."""
        self.classes = list(classes)

    def predict(self, inputs: Sequence[Path]) -> Iterator[Prediction]:
        """The probabilities of every row of the files, and of the files in the folders."""
        columns = {what: column for what, column in self.options.columns.items() if what != "label"}
        rows = unlabelled_rows(inputs, columns)
        while some := list(itertools.islice(rows, _AT_ONCE)):
            found = [self._asked(one, row) for one, row in some]
            shares = self._shares([one for one in found if not isinstance(one, RowError)])
            for one, (_, row) in zip(found, some, strict=True):
                name = f"{row.file}:{row.number}"
                if isinstance(one, RowError):
                    yield Prediction(name, problem=one.reason)
                else:
                    own = next(shares)
                    yield Prediction(name, own.tolist(), [int(own.argmax())])

    def _asked(self, one: Asked | RowError, row: Row) -> Encoding | RowError:
        if isinstance(one, RowError):
            return one
        return unlabelled(*one, self.tokenizer, self.options.block_size) or row.error("has a text without a token")

    def _shares(self, items: Sequence[Encoding]) -> Iterator[Tensor]:
        """The probabilities [classes] of each text."""
        if not items:
            return iter(())
        logits = self._logits(to_device(self.collate(items), next(self.model.parameters()).device))
        return iter(logits.double().softmax(-1).cpu())

    def probe(self) -> Tensor:
        """The logits [1, classes] of a few tokens, in float32."""
        return _probed(self.model)

    def write_model(self, folder: Path) -> Tensor:
        """The classifier with the names of its classes, and its tokenizer, as transformers loads them."""
        model: Any = self.model
        model.config.id2label = dict(enumerate(self.classes))
        model.config.label2id = {name: number for number, name in enumerate(self.classes)}
        write_language_model(model, self.tokenizer, folder)
        plain, _ = load_text_classifier(str(folder), self.config.dtype, None)
        return _probed(plain.to(model.device).eval())

    def evaluate(self) -> Mapping[str, float]:
        """Loss, accuracy and the mean F1 of the classes, on the texts that were held out."""
        held_out, size = self.split[1], self.config.batch_size
        if not held_out:
            return {}
        batches = (self.collate(held_out[start : start + size]) for start in range(0, len(held_out), size))
        logits = torch.cat([self._logits(to_device(batch, self.device)).double().cpu() for batch in batches])
        labels = torch.from_numpy(held_out.labels.copy())
        return {"loss": F.cross_entropy(logits, labels).item(), **scores(logits.argmax(-1), labels, len(self.classes))}

    def measures(self) -> Collection[str]:
        """See `evaluate`."""
        return ("loss", "accuracy", "f1") if self.split[1] else ()

    def finish(self, samples: Path) -> Mapping[str, Any]:
        """What the numbers of the classes mean, and on how many texts was measured."""
        return {"classes": self.classes, "held out texts": len(self.split[1])}

    @functools.cached_property
    def source(self) -> Source:
        """What is trained on, read."""
        return read_source(Path(self.config.data), self.options.columns, LABELLED)

    @functools.cached_property
    def validation(self) -> Source | None:
        """What is measured with, where it is a file of its own."""
        told = self.options.validation
        return read_source(Path(told), self.options.columns, LABELLED) if told else None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.config.model)

    @functools.cached_property
    def cache(self) -> TokenCache:
        """Where tokens are kept."""
        return cache_of(self.options, self.config)

    @functools.cached_property
    def split(self) -> tuple[Texts, Texts]:
        """The texts to train on, and those that are held out."""
        sources = [one for one in (self.source, self.validation) if one is not None]
        found = [self._encoded(one) for one in sources]
        self.cut = sum(record["cut"] for _, record in found)
        self.longest = found[0][1]["longest"]
        texts = [Texts(shelf, record["inputs"]) for shelf, record in found]
        if self.validation is not None:
            return texts[0], texts[1]
        return split_classes(texts[0], self.classes, self.options.validation_fraction, self.config.seed)

    def _encoded(self, source: Source) -> tuple[Shelf, Mapping[str, Any]]:
        limit, known = self.options.block_size, self.cache.folder is not None
        parts = (*source.identity, self.classes, limit, identity_of_tokenizer(self.tokenizer)) if known else ()
        said = (one for one, _ in source)
        return self.cache.get(parts, lambda shelf: encode(said, self.classes, self.tokenizer, limit, shelf))

    @property
    def _fresh(self) -> int | None:
        return len(self.classes) if self.options.train_head else None

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        return self.model(**batch["inputs"], **uncached(self.model)).logits

    def _numbered(self, record: DataRecord, before: DataRecord | None) -> DataRecord:
        """With the classes in the order of the model's own outputs, where its head stays.

        Raises:
            ConfigError: The model has other classes.
        """
        if self.options.train_head or before is not None:
            return record.following(before)
        told = label_names(self.config.model)
        if ordered := in_order_of(told, record.classes):
            return replace(record, classes=ordered)
        raise ConfigError(
            [
                f"options.train_head: the model's classes are {', '.join(told) or 'without names'}, and the data's "
                f"{', '.join(record.classes)}; set it to true to train a head for them"
            ],
            "run",
        )


def _probed(model: Any) -> Tensor:
    tokens = torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size
    return model(input_ids=tokens[None]).logits.float().cpu()
