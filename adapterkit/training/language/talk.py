"""A conversation with a model: what was said, and what it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.training.language.conversations import ASSISTANT, Message
from adapterkit.training.language.generation import Writer


@dataclass
class Talk:
    """What was said so far, and how answers are drawn.

    Attributes:
        writer: Goes on from it.
        system: What the assistant is told first; nothing where it is empty.
        tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token.
        seed: Of the next answer; each answer has the next one.
        messages: What user and assistant have said.
        forgotten: How many of the oldest messages the model no longer sees, for the room is full.
    """

    writer: Writer
    system: str = ""
    tokens: int = 512
    temperature: float = 0.7
    seed: int = 42
    messages: list[Message] = field(default_factory=list[Message])
    forgotten: int = 0

    def answer(self, said: str, streamer: Any = None) -> str:
        """What the assistant answers; both are kept.

        Args:
            said: By the user.
            streamer: Of transformers, which is told of every token.

        Raises:
            ConfigError: There is no chat template, or the model has no room even for what was said last.
        """
        self.messages.append({"role": "user", "content": said})
        try:
            start = self._start()
            drawn = self.writer.write(
                start, seed=self.seed, tokens=self.tokens, temperature=self.temperature, streamer=streamer
            )
        except BaseException:  # an interrupted answer leaves the conversation as it was
            self.messages.pop()
            raise
        answer = self.writer.text(drawn[start.shape[1] :])
        self.messages.append({"role": ASSISTANT, "content": answer})
        self.seed += 1
        return answer

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages.clear()
        self.forgotten = 0

    def undo(self) -> str:
        """Takes the last answer back, and what it was to, which is returned; empty where nothing was said."""
        said = self.messages[-2:]
        del self.messages[-2:]
        self.forgotten = min(self.forgotten, len(self.messages))
        return said[0]["content"] if said else ""

    def row(self) -> str:
        """The conversation as a line of JSONL, as `causal-lm` is trained on."""
        return json.dumps({"messages": self._seen(0)}, ensure_ascii=False)

    def _seen(self, first: int) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages[first:]]

    def _start(self) -> Tensor:
        """The tokens of what the model sees: as much of the end as leaves room for an answer."""
        while True:
            start = self.writer.start_of_answer(self._seen(self.forgotten))
            room = self.writer.room(start)
            if room is None or room >= self.tokens:
                return start
            if self.forgotten + 2 >= len(self.messages):
                if room > 0:
                    return start
                raise ConfigError([f"the model reads {start.shape[1] + room} tokens, which are used up"], "chat")
            self.forgotten += 2
