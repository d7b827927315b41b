"""What all tasks on causal language models share: the model, its tokenizer, its template, samples, files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.training.export.libraries import peft_reader
from adapterkit.training.language.generation import Sampling, Writer, pad_of
from adapterkit.training.language.options import Reading, check_length
from adapterkit.training.language.templates import Template, template_of
from adapterkit.training.language.writing import write_language_model
from adapterkit.training.loading import checkpoint_activations, load_causal_lm, load_tokenizer, outline_causal_lm
from adapterkit.training.task import OtherReader, Sample, Task, samples_of

_PROBED = 8


class Options(Sampling, Reading):
    """The keys that they have.

    Attributes:
        chat_template: How a conversation becomes text: the tokenizer's own template by default, the file of one,
            `turns` for a simple one, or `plain` for none, where a prompt and its completion follow each other.
    """

    chat_template: str | None = None


class LanguageTask(Task):
    """A causal language model of transformers; subclasses say what it learns."""

    options: Options
    sampling = ("chat_template", "sample_as", "sample_tokens", "temperature")
    free_options = frozenset({"cache", "prompts", "sample_as", "sample_seeds", "sample_tokens", "temperature"})

    def outline(self) -> nn.Module:
        """The model's shape."""
        outline = outline_causal_lm(self.config.model)
        check_length(outline, self.options.block_size)
        return outline

    def load_model(self) -> nn.Module:
        """The model; its tokenizer is kept here."""
        self.model, self.tokenizer = load_causal_lm(self.config.model, self.config.dtype)
        return self.model.eval()

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """Nothing but the place of the model."""
        self.device = device

    def checkpoint_activations(self) -> None:
        """As transformers does it."""
        checkpoint_activations(self.model)

    def exports(self) -> Sequence[str]:
        """A folder of PEFT."""
        return ("peft",)

    def probe(self) -> Tensor:
        """Logits [tokens, vocabulary] of the end of a few tokens, in float32."""
        return _probed(self.model)

    def write_model(self, folder: Path) -> Tensor:
        """The model, its tokenizer and the chat template that it was trained with, as transformers loads them."""
        model: Any = self.model
        if self.options.chat_template is not None and self.template is not None:
            self.tokenizer.chat_template = self.template.text
        write_language_model(model, self.tokenizer, folder)
        plain, _ = load_causal_lm(str(folder), self.config.dtype)
        return _probed(plain.to(model.device).eval())

    def other_reader(self, format: str) -> OtherReader | None:
        """PEFT reads its own."""
        return peft_reader(self.model) if format == "peft" else None

    def samples(self) -> Sequence[Sample]:
        """Those of the options."""
        return samples_of(self.options.prompts, self.options.sample_seeds)

    def generate(self, sample: Sample, path: Path) -> None:
        """The prompt and how the model goes on."""
        writer, options, prompt = self.writer(), self.options, sample.prompt
        chat = options.sample_as == "chat"
        asked = {"role": "user", "content": prompt}
        start = writer.start_of_answer([asked]) if chat else writer.start_of_text(prompt)
        tokens = writer.write(start, seed=sample.seed, tokens=options.sample_tokens, temperature=options.temperature)
        text = f"{prompt}\n\n{writer.text(tokens[start.shape[1] :])}" if chat else writer.text(tokens)
        path.write_text(f"{text}\n", encoding="utf-8")

    def writer(self) -> Writer:
        """What goes on from texts and conversations."""
        return Writer(self.model, self.tokenizer, self.template, self.device)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.config.model)

    @functools.cached_property
    def template(self) -> Template | None:
        """How conversations become text."""
        return template_of(self.tokenizer, self.options.chat_template)

    def pad_id(self) -> int:
        """The token that fills rows up."""
        return pad_of(self.tokenizer)


def _probed(model: Any) -> Tensor:
    tokens = torch.arange(2 * _PROBED, device=model.device) % model.config.get_text_config().vocab_size
    return model(input_ids=tokens[None], use_cache=False).logits[0, -_PROBED:].float().cpu()
