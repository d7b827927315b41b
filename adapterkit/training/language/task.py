"""The task `causal-lm`: next-token prediction on texts, on what answers prompts, and on conversations."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from adapterkit.training.data_record import DataRecord
from adapterkit.training.language import base
from adapterkit.training.language.apart import check_apart
from adapterkit.training.language.corpus import read_source
from adapterkit.training.language.examples import Examples, make_examples
from adapterkit.training.language.likelihood import learnt_in, token_losses, tokens_in
from adapterkit.training.language.packing import Line, Lines, Packing, collated, line_of
from adapterkit.training.language.tokens import Encoder, Learn
from adapterkit.training.parts import to_device
from adapterkit.training.task import Setting


class Options(base.Options):
    """The keys under `options`.

    The columns of a file are `messages` or `conversations` (chats), `instruction`, `input` and `output`, `prompt` and
    `completion`, or `text`.

    Attributes:
        learn: What the loss is about: the assistant's answers and `completions`, of each conversation the `last`
            answer, or `everything`. Of texts always all, and of messages with a `weight` of 0 nothing.
        packing: `rows` has an example in each. `documents` has several, none of which sees another. `joined` has all,
            with end marks, one behind the other and cut into blocks; what is left over is not used. By default texts
            are joined, and all else is in rows.
    """

    learn: Learn = "completions"
    packing: Packing | None = None


class CausalLMTask(base.LanguageTask):
    """Cross entropy of the next token, on transformers' causal language models.

    The loss of a batch is the mean over its tokens that are learnt.
    """

    Options = Options
    options: Options

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads and tokenizes everything, so that what is wrong with a file is found before the model is loaded."""
        notes = list(self.examples.notes)
        if self.options.prompts and self.options.sample_as == "text" and not self.examples.is_text:
            notes.append("options.prompts are gone on from as they are; options.sample_as=chat asks them as a user")
        return DataRecord(self.examples.files, notes=notes, facts=self.examples.facts)

    def prepare(self, setting: Setting) -> Lines:
        """The rows to train on."""
        self.device = setting.device
        if self.examples.packing == "documents":
            check_apart(self.model, self.device)
        self.held_out = self.examples.held_out
        return self.examples.training

    def collate(self, items: Sequence[Line]) -> dict[str, Tensor]:
        """See `collated`."""
        return collated(items, self.pad_id(), apart=self.examples.packing == "documents")

    def amount(self, batch: Mapping[str, Tensor]) -> tuple[int, str]:
        """Its tokens, without padding."""
        return tokens_in(batch), "tokens"

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """The tokens that are learnt."""
        return float(learnt_in(batch))

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over the tokens that are learnt, in float32."""
        return token_losses(self.model, batch).sum() / learnt_in(batch)

    def evaluate(self) -> Mapping[str, float]:
        """Loss and perplexity of the tokens that were held out."""
        total, count = 0.0, 0
        for start in range(0, len(self.held_out), self.config.batch_size):
            lines = [line_of([one]) for one in self.held_out[start : start + self.config.batch_size]]
            batch = to_device(collated(lines, self.pad_id(), apart=False), self.device)
            total += token_losses(self.model, batch).double().sum().item()
            count += int(learnt_in(batch))
        return {"loss": total / count, "perplexity": math.exp(total / count)} if count else {}

    def measures(self) -> Collection[str]:
        """See `evaluate`."""
        return ("loss", "perplexity") if self.examples.held_out else ()

    @functools.cached_property
    def examples(self) -> Examples:
        """The data as tokens; its text is not kept."""
        options = self.options
        source = read_source(Path(self.config.data), options.columns)
        measured = read_source(Path(options.validation), options.columns) if options.validation else None
        encoder = Encoder(self.tokenizer, options.learn)
        return make_examples(source, measured, self.template, encoder, options, options.packing, self.config)
