"""The task `causal-lm`: next-token prediction on texts, on what answers prompts, and on conversations."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.config import Seed
from adapterkit.training.data_record import DataRecord
from adapterkit.training.export.libraries import peft_reader
from adapterkit.training.language.apart import check_apart
from adapterkit.training.language.corpus import Source, read_source
from adapterkit.training.language.examples import Examples, make_examples
from adapterkit.training.language.likelihood import learnt_in, token_losses
from adapterkit.training.language.options import Reading
from adapterkit.training.language.packing import Line, Lines, Packing, collated, line_of
from adapterkit.training.language.templates import template_of
from adapterkit.training.language.tokens import Encoder, Learn
from adapterkit.training.loading import checkpoint_activations, load_causal_lm, load_tokenizer, outline_causal_lm
from adapterkit.training.task import OtherReader, Setting, Task

_PROBED = 8


class Options(Reading):
    """The keys under `options`.

    The columns of a file are `messages` or `conversations` (chats), `instruction`, `input` and `output`, `prompt` and
    `completion`, or `text`.

    Attributes:
        chat_template: How a conversation becomes text: the tokenizer's own template by default, the file of one,
            `turns` for a simple one, or `plain` for none, where a prompt and its completion follow each other.
        learn: What the loss is about: the assistant's answers and `completions`, or `everything`. Of texts always all.
        packing: `rows` has an example in each. `documents` has several, none of which sees another. `joined` has all,
            with end marks, one behind the other and cut into blocks; what is left over is not used. By default texts
            are joined, and all else is in rows.
        prompts: What samples begin with.
        sample_seeds: The seeds of the samples.
        sample_tokens: Length of a sample.
        temperature: Of the samples; 0 takes the likeliest token.
    """

    chat_template: str | None = None
    learn: Learn = "completions"
    packing: Packing | None = None
    prompts: list[str] = Field([])
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)


class CausalLMTask(Task):
    """Cross entropy of the next token, on transformers' causal language models.

    The loss of a batch is the mean over its tokens that are learnt.
    """

    Options = Options
    options: Options
    sampling = ("sample_tokens", "temperature")
    free_options = frozenset({"prompts", "sample_seeds", "sample_tokens", "temperature"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads and tokenizes everything, so that what is wrong with a file is found before the model is loaded."""
        files = dict(self.source.files)
        if self.validation is not None:
            files |= {f"validation/{name}": key for name, key in self.validation.files.items()}
        return DataRecord(files, notes=self.examples.notes, facts=self.examples.facts)

    def outline(self) -> nn.Module:
        """The model's shape."""
        return outline_causal_lm(self.config.model)

    def load_model(self) -> nn.Module:
        """The model; its tokenizer is kept here."""
        self.model, self.tokenizer = load_causal_lm(self.config.model, self.config.dtype)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Lines:
        """The rows to train on."""
        self.device = setting.device
        self._check_length()
        if self.examples.packing == "documents":
            check_apart(self.model, self.device)
        self.held_out = self.examples.held_out
        return self.examples.training

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """Nothing but the place of the model."""
        self.device = device

    def collate(self, items: Sequence[Line]) -> dict[str, Tensor]:
        """See `collated`."""
        return collated(items, self._pad_id(), apart=self.examples.packing == "documents")

    def amount(self, batch: Mapping[str, Tensor]) -> tuple[int, str]:
        """Its tokens, without padding."""
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel(), "tokens"

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean over the tokens that are learnt, in float32."""
        return token_losses(self.model, batch).sum() / learnt_in(batch)

    def checkpoint_activations(self) -> None:
        """As transformers does it."""
        checkpoint_activations(self.model)

    def evaluate(self) -> Mapping[str, float]:
        """Loss and perplexity of the tokens that were held out."""
        total, count = 0.0, 0
        for start in range(0, len(self.held_out), self.config.batch_size):
            lines = [line_of([one]) for one in self.held_out[start : start + self.config.batch_size]]
            batch = {key: value.to(self.device) for key, value in collated(lines, self._pad_id(), apart=False).items()}
            total += token_losses(self.model, batch).double().sum().item()
            count += int(learnt_in(batch))
        return {"loss": total / count, "perplexity": math.exp(total / count)} if count else {}

    def exports(self) -> Sequence[str]:
        """A folder of PEFT."""
        return ("peft",)

    def probe(self) -> Tensor:
        """Logits [tokens, vocabulary] of the end of the first row, in float32."""
        model: Any = self.model
        tokens = self.examples.training.line(0).tokens.to(self.device)
        return model(input_ids=tokens[None], use_cache=False).logits[0, -_PROBED:].float().cpu()

    def other_reader(self, format: str) -> OtherReader | None:
        """PEFT reads its own."""
        return peft_reader(self.model) if format == "peft" else None

    def prompts(self) -> Sequence[str]:
        """Those of the options."""
        return self.options.prompts

    def seeds(self) -> Sequence[int]:
        """Those of the options."""
        return self.options.sample_seeds

    def generate(self, prompt: str, seed: int, path: Path) -> None:
        """The prompt and how the model goes on."""
        start = self._start(prompt)
        drawn = self.options.temperature > 0
        model: Any = self.model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=self.options.sample_tokens,
                do_sample=drawn,
                pad_token_id=self._pad_id(),
                **({"temperature": self.options.temperature} if drawn else {}),
            )
        text = self.tokenizer.decode(tokens[0], skip_special_tokens=True)
        path.write_text(text + "\n", encoding="utf-8")

    @functools.cached_property
    def source(self) -> Source:
        """What is trained on, read."""
        return read_source(Path(self.config.data), self.options.columns)

    @functools.cached_property
    def validation(self) -> Source | None:
        """What is measured with, where it is a file of its own."""
        return read_source(Path(self.options.validation), self.options.columns) if self.options.validation else None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.config.model)

    @functools.cached_property
    def examples(self) -> Examples:
        """The data as tokens."""
        sources = self.source, self.validation
        template = template_of(self.tokenizer, self.options.chat_template)
        encoder = Encoder(self.tokenizer, self.options.learn)
        return make_examples(*sources, template, encoder, self.options, self.options.packing, self.config)

    def _start(self, prompt: str) -> Tensor:
        """The prompt's tokens [1, tokens]; where it has none, the end mark, after which a document begins."""
        tokens = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer.eos_token_id
        if not tokens and end is None:
            raise ConfigError([f"options.prompts: {prompt!r} has no token to go on from"], "run")
        return torch.tensor([tokens or [end]], device=self.device)

    def _pad_id(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((i for i in ids if i is not None), 0)

    def _check_length(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and self.options.block_size > limit:
            raise ConfigError(
                [f"options.block_size: the model reads at most {limit} tokens, not {self.options.block_size}"], "run"
            )
