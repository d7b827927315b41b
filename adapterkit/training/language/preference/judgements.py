"""What rows of preference data say, and their answers as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import ConfigError
from adapterkit.training.language.conversations import Conversation, Exchange, Rendered, conversation_of
from adapterkit.training.language.layouts import COMPLETIONS, PROMPTS, Layout, Part, chat, listed_in, text_of
from adapterkit.training.language.rows import Row
from adapterkit.training.language.templates import PLAIN, TURNS, Template


@dataclass(frozen=True)
class Answer:
    """What answers a prompt.

    Attributes:
        said: Both.
        after: Of a conversation, how many messages are the prompt.
    """

    said: Exchange | Conversation
    after: int = 0

    def rendered(self, template: Template | None, row: Row) -> Rendered:
        """As text, with the answer to be learnt.

        Raises:
            ConfigError: It is a conversation, and there is no template.
            DataError: The template does not take it.
        """
        if template is None:
            if isinstance(self.said, Exchange):
                return self.said.plain()
            raise ConfigError(
                [f"options.chat_template: there is none; name a file of one, or {TURNS}. {PLAIN} takes texts alone"],
                "run",
            )
        said, after = self.said, self.after
        if isinstance(said, Exchange):
            said = said.conversation()
            after = len(said.messages) - 1
        try:
            examples = template.answers(said, [place for place in said.answers if place >= after])
        except ValueError as error:
            raise row.error(str(error)) from error
        if len(examples) != 1 or not examples[0].learnt:
            raise row.error("has an answer that is no single turn of the assistant in the chat template")
        return examples[0]


@dataclass(frozen=True)
class Pair:
    """Two answers, the first of which is better."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is good."""

    answer: Answer
    good: bool


def _pair(part: Part, row: Row) -> Pair:
    prompt, system = listed_in(part.get("prompt"), row), part.get("system") or ""
    chosen, rejected = (listed_in(part[what], row) for what in ("chosen", "rejected"))
    if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
        before = [] if prompt is None else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        one, other = _joined(before, chosen), _joined(before, rejected)
        shared = _alike(one, other) if prompt is None else len(before)
        return Pair(*(_conversation(messages, shared, system, row) for messages in (one, other)))
    if prompt is None:
        raise row.error("has no prompt, and its answers are no lists of messages that begin with one")
    asked = text_of(prompt, "prompt", row)
    texts = (text_of(part[what], what, row) for what in ("chosen", "rejected"))
    return Pair(*(Answer(Exchange(asked, text, system)) for text in texts))


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """With how many of the same messages two conversations begin."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _joined(before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """Some data sets repeat the prompt in the answers."""
    repeats = list(after[: len(before)]) == list(before)
    return list(after) if repeats else [*before, *after]


def _conversation(messages: list[Any], shared: int, system: str, row: Row) -> Answer:
    made = conversation_of(messages, row, system=system)
    return Answer(made, shared + len(made.messages) - len(messages))


def _judged(part: Part, row: Row) -> Judged:
    told = str(part["label"]).casefold()
    if told not in ("true", "false", "1", "0"):
        raise row.error(f"must have true or false as 'label', not {part['label']!r:.60}")
    prompt, completion = listed_in(part["prompt"], row), listed_in(part["completion"], row)
    good, system = told in ("true", "1"), part.get("system") or ""
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        made = chat({"messages": [*prompt, *completion], "system": part.get("system")}, row)
        return Judged(Answer(made, len(made.messages) - len(completion)), good)
    said = Exchange(text_of(prompt, "prompt", row), text_of(completion, "completion", row), system)
    return Judged(Answer(said), good)


_MORE = {"system": ("system", "system_prompt")}
PREFERENCES: tuple[Layout[Pair | Judged], ...] = (
    Layout("preferences", {"chosen": ("chosen",), "rejected": ("rejected",)}, _pair, {"prompt": PROMPTS, **_MORE}),
    Layout(
        "judgements",
        {"prompt": PROMPTS, "completion": COMPLETIONS, "label": ("label",)},
        _judged,
        _MORE,
    ),
)
"""Pairs of answers, or answers that are good or bad."""
