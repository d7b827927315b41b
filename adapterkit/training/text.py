"""The task `causal-lm`: next-token prediction on plain text or JSONL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.config import Section, Seed
from adapterkit.training.data_files import Notes, content_key, name_of
from adapterkit.training.data_record import DataRecord
from adapterkit.training.export.libraries import peft_reader
from adapterkit.training.loading import checkpoint_activations, load_causal_lm, outline_causal_lm
from adapterkit.training.order import Draw
from adapterkit.training.task import OtherReader, Setting, Task
from adapterkit.training.text_files import read_documents, text_files

_PROBED = 8


class Options(Section):
    """The keys under `options`.

    Attributes:
        block_size: Tokens per example. The documents are joined, each with an end mark, and cut into blocks; what is
            left over at the end is not used.
        validation_fraction: Share of the blocks, the last ones, that is held out to measure the perplexity.
        prompts: What samples begin with.
        sample_seeds: The seeds of the samples.
        sample_tokens: Length of a sample.
        temperature: Of the samples; 0 takes the likeliest token.
    """

    block_size: int = Field(256, gt=1)
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    prompts: list[str] = Field([])
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)


class Blocks:
    """Token blocks [blocks, block_size], in int32."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, draw: Draw) -> Tensor:
        """One block; nothing about it is random."""
        return self.tokens[draw.index].long()


class CausalLMTask(Task):
    """Cross entropy of the next token, on transformers' causal language models."""

    Options = Options
    options: Options
    sampling = ("sample_tokens", "temperature")

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads every file once, so that what is wrong with one is found before the model is loaded."""
        path = Path(self.config.data)
        notes = Notes(path)
        read_documents(path, notes)
        files = {name_of(file, path): content_key(file) for file in text_files(path)}
        return DataRecord(files, notes=notes.sentences())

    def outline(self) -> nn.Module:
        """The model's shape."""
        return outline_causal_lm(self.config.model)

    def load_model(self) -> nn.Module:
        """The model; its tokenizer is kept here."""
        self.model, self.tokenizer = load_causal_lm(self.config.model, self.config.dtype)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Blocks:
        """Reads, tokenizes, joins, cuts and splits."""
        self.device = setting.device
        self._check_length()
        blocks = self._pack(read_documents(Path(self.config.data)))
        held_out = max(1, round(len(blocks) * self.options.validation_fraction))
        if len(blocks) < 2:
            raise DataError(
                f"data {self.config.data} fills {len(blocks)} block of {self.options.block_size} tokens; two are "
                "needed, one to train and one to measure. Lower options.block_size"
            )
        self.held_out = blocks[-held_out:].long()
        return Blocks(blocks[:-held_out])

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """Nothing but the place of the model."""
        self.device = device

    def loss(self, batch: Tensor) -> Tensor:
        """Mean over all tokens but the first of each block, in float32."""
        logits = self.model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    def checkpoint_activations(self) -> None:
        """As transformers does it."""
        checkpoint_activations(self.model)

    def evaluate(self) -> Mapping[str, float]:
        """Perplexity of the blocks that were held out."""
        losses = [self.loss(block.to(self.device)[None]).double().item() for block in self.held_out]
        return {"perplexity": math.exp(sum(losses) / len(losses))}

    def exports(self) -> Sequence[str]:
        """A folder of PEFT."""
        return ("peft",)

    def probe(self) -> Tensor:
        """Logits [tokens, vocabulary] of the end of the first block that is held out, in float32."""
        model: Any = self.model
        return model(input_ids=self.held_out[:1].to(self.device), use_cache=False).logits[0, -_PROBED:].float().cpu()

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

    def _pack(self, documents: Sequence[str]) -> Tensor:
        """Blocks of the documents' tokens, in four bytes each."""
        end = self.tokenizer.eos_token_id
        mark = [] if end is None else [end]
        encoded = (self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents)
        stream = torch.cat([torch.tensor(tokens + mark, dtype=torch.int32) for tokens in encoded])
        count = len(stream) // self.options.block_size
        return stream[: count * self.options.block_size].view(count, self.options.block_size)
