"""Going on from a prompt, as text or as a turn of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.config import Section, Seed
from adapterkit.training.language.conversations import Conversation
from adapterkit.training.language.templates import Template
from adapterkit.training.language.tokens import end_marks
from adapterkit.training.samples.prompts import Prompts

SampleAs = Literal["text", "chat"]


class Sampling(Section):
    """How samples are made.

    Attributes:
        prompts: What samples begin with, a list, or a file that holds one (.txt, .jsonl, .yaml).
        sample_as: `text` goes on from a prompt as it is; `chat` asks it as a user, by the chat template.
        sample_seeds: The seeds of the samples.
        sample_tokens: Most tokens of a sample.
        temperature: Of the samples; 0 takes the likeliest token.
    """

    prompts: Prompts = Field([])
    sample_as: SampleAs = "text"
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, ge=0)


class Writer:
    """Goes on from texts and conversations.

    Args:
        model: A causal language model of transformers, with whatever acts on it.
        tokenizer: Its tokenizer.
        template: Of conversations; None where there is none.
        device: Where the model is.
    """

    def __init__(self, model: Any, tokenizer: Any, template: Template | None, device: torch.device) -> None:
        self.model, self.tokenizer, self.template, self.device = model, tokenizer, template, device

    def start_of_text(self, prompt: str) -> Tensor:
        """The prompt's tokens [1, tokens]; where it has none, the end mark, after which a document begins.

        Raises:
            ConfigError: There is no such mark either.
        """
        tokens = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer.eos_token_id
        if not tokens and end is None:
            raise ConfigError([f"options.prompts: {prompt!r} has no token to go on from"], "run")
        return torch.tensor([tokens or [end]], device=self.device)

    def chat_template(self) -> Template:
        """That of conversations.

        Raises:
            ConfigError: There is none.
        """
        if self.template is None:
            raise ConfigError(
                ["options.chat_template: the tokenizer has no chat template; name a file of one, or turns"], "run"
            )
        return self.template

    def start_of_answer(self, messages: Sequence[Any]) -> Tensor:
        """The tokens [1, tokens] of a conversation, and of what stands before the assistant's answer.

        Raises:
            ConfigError: There is no template, or it does not take these messages.
        """
        try:
            text = self.chat_template().render(Conversation(tuple(messages)), ask=True)
        except ValueError as error:
            raise ConfigError([f"the conversation {error}"], "run") from error
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]], device=self.device)

    def write(self, start: Tensor, *, seed: int, tokens: int, temperature: float, streamer: Any = None) -> Tensor:
        """The tokens [tokens] of the start and of what the model goes on with; the global generator stays as it was.

        Args:
            start: [1, tokens].
            seed: Decides what is drawn.
            tokens: At most so many.
            temperature: 0 takes the likeliest token.
            streamer: Of transformers: told of every token as it is drawn.
        """
        drawn = temperature > 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self.model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=tokens,
                do_sample=drawn,
                pad_token_id=pad_of(self.tokenizer),
                eos_token_id=self._ends(),
                streamer=streamer,
                **({"temperature": temperature} if drawn else {}),
            )
        return found[0]

    def room(self, start: Tensor) -> int | None:
        """How many tokens the model can read behind a start; None where it sets no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else limit - start.shape[1]

    def _ends(self) -> list[int] | None:
        """The tokens at which generation stops: the model's own, and the tokenizer's mark of an end."""
        told = self.model.generation_config.eos_token_id
        own = [] if told is None else [told] if isinstance(told, int) else list(told)
        return sorted({*own, *end_marks(self.tokenizer)}) or None

    def text(self, tokens: Tensor) -> str:
        """What tokens [tokens] say, without special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def pad_of(tokenizer: Any) -> int:
    """The token that fills rows up: any, for nothing looks at it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None), 0)
