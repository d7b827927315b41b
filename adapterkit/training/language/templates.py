"""How a conversation becomes text, and which of it the assistant says: by the chat template of the tokenizer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.language.conversations import CALLS, Conversation, Message, Rendered, Span
from adapterkit.training.text_files import read_text

PLAIN, TURNS = "plain", "turns"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """A chat template.

    Args:
        text: In Jinja.
        special: The tokenizer's special tokens, which templates name.
    """

    def __init__(self, text: str, special: dict[str, Any]) -> None:
        self.text, self.special = text, special
        self.marked = _MARKED.search(text) is not None

    def render(self, conversation: Conversation, *, ask: bool = False) -> str:
        """The conversation as text.

        Args:
            conversation: Its messages.
            ask: End with what stands before an answer of the assistant.

        Raises:
            ValueError: The template does not take these messages.
        """
        return self._rendered(conversation, ask=ask)[0]

    def answers(self, conversation: Conversation, places: Sequence[int] | None = None) -> list[Rendered]:
        """The conversation with the assistant's answers to be learnt.

        They are where the template marks them, or else what each adds to the messages before it. A template
        may write an answer otherwise once it is no longer the last (without its reasoning, say). Then each answer is an
        example of its own, behind what stands before it when the model is asked.

        Args:
            conversation: Its messages.
            places: Of the answers that are learnt, the places among the messages; None for all.

        Raises:
            ValueError: The template does not take these messages, or does not write what it asks with.
        """
        places = conversation.answers if places is None else places
        self._check_written(conversation)
        if self.marked:
            return [self._marked(conversation, places)]
        examples = [self._last(conversation.until(place + 1)) for place in places]
        text = self.render(conversation)
        spans = [_span_in(text, one, conversation.messages[at]) for one, at in zip(examples, places, strict=True)]
        return examples if None in spans else [Rendered(text, [span for span in spans if span is not None])]

    def _check_written(self, conversation: Conversation) -> None:
        """Refuses a conversation of which the template would leave something out without a word."""
        bare = tuple({key: value for key, value in one.items() if key != CALLS} for one in conversation.messages)
        without = {
            "tools": replace(conversation, tools=None) if conversation.tools else conversation,
            "tool_calls": replace(conversation, messages=bare),
        }
        for what, other in without.items():
            if other != conversation and self.render(other) == self.render(conversation):
                raise ValueError(f"has {what!r}, which the chat template does not write; name one that does")

    def _marked(self, conversation: Conversation, places: Sequence[int]) -> Rendered:
        text, spans = self._rendered(conversation)
        if len(spans) < conversation.replies:
            told = f"{len(spans)} answers of {len(conversation.answers)}"
            raise ValueError(f"has answers that the template does not mark: {told}; mend its {{% generation %}}")
        if len(places) == len(conversation.answers):
            return Rendered(text, spans)
        if len(spans) != len(conversation.answers):
            told = f"{len(spans)} answers of {len(conversation.answers)}"
            raise ValueError(f"is to be learnt in part, and the template marks {told}")
        chosen = [span for span, place in zip(spans, conversation.answers, strict=True) if place in places]
        return Rendered(text, chosen)

    def _last(self, conversation: Conversation) -> Rendered:
        """A conversation that ends with an answer, which is to be learnt."""
        asked = self.render(conversation.until(len(conversation.messages) - 1), ask=True)
        text = self.render(conversation)
        if not text.startswith(asked):
            raise ValueError(
                "the template writes an answer otherwise than it asks for it, so that where it begins is not known; "
                "mark it in the template with {% generation %} and {% endgeneration %}"
            )
        return Rendered(text, [(len(asked), len(text))])

    def _rendered(self, conversation: Conversation, *, ask: bool = False) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in conversation.messages]],
                tools=list(conversation.tools) if conversation.tools else None,
                chat_template=self.text,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=ask,
                **self.special,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"is not what the chat template takes ({' '.join(str(error).split())})") from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if self.marked else []


def _span_in(text: str, example: Rendered, answer: Message) -> Span | None:
    """Where in the whole conversation an answer is that ends an example; None where it is written otherwise there.

    What a template writes behind the last message of all is left out; where that begins as the next message does, the
    span ends within a token of it, which is not learnt as it is not wholly inside.
    """
    start, end = example.learnt[0]
    if text.startswith(example.text):
        return start, end
    alike = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(text, example.text, strict=False)))
    said = str(answer["content"]).strip()
    place = example.text.find(said, start) if said else -1
    return (start, alike) if place >= 0 and place + len(said) <= alike else None


def template_of(tokenizer: Any, told: str | None) -> Template | None:
    """The template of a run.

    Args:
        tokenizer: Has one, or none.
        told: None for the tokenizer's; "turns" for a simple one; "plain" for none; else the file of one.

    Returns:
        None where there is none.

    Raises:
        ConfigError: The file cannot be read.
    """
    special = dict(tokenizer.special_tokens_map)
    if told == PLAIN:
        return None
    if told is None:
        return Template(_own(tokenizer), special) if tokenizer.chat_template else None
    try:
        return Template(read_text(Path(__file__).with_name("turns.jinja") if told == TURNS else Path(told)), special)
    except DataError as error:
        raise ConfigError([f"options.chat_template: {error}; name a file, or {TURNS}, or {PLAIN}"], "run") from error


def _own(tokenizer: Any) -> str:
    """Of several named ones the default."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError([f"options.chat_template: {error}; save the one that is meant in a file"], "run") from error
