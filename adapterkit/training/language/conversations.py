"""What a row says: a text, a prompt with what answers it, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.training.language.rows import Row

Message = Mapping[str, Any]
Span = tuple[int, int]
ASSISTANT, CALLS = "assistant", "tool_calls"
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "bot": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": ASSISTANT,
}
"""Roles as data sets call them, and as templates do."""


@dataclass(frozen=True)
class Rendered:
    """A text, and which of it is to be learnt.

    Attributes:
        text: All of it.
        learnt: Beginnings and ends of what is learnt, in characters.
        framed: Whether it stands alone, so that the tokenizer's marks of beginning and end belong around it; a template
            writes its own.
        whole: Whether it is a document, which may be split.
        before, after: What is beside it, where it is a part of a long text; see `Row`.
    """

    text: str
    learnt: Sequence[Span]
    framed: bool = False
    whole: bool = False
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Document:
    """A text by itself, or a part of one; see `Row`."""

    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and what answers it: plain text, or turns of a conversation where there is a template for them."""

    prompt: str
    completion: str
    system: str = ""

    def plain(self) -> Rendered:
        """One behind the other, as they are."""
        before = (f"{self.system}\n\n" if self.system else "") + self.prompt
        text = before + self.completion
        return Rendered(text, [(len(before), len(text))], framed=True)

    def conversation(self) -> Conversation:
        """The same as turns of a user and an assistant."""
        return asked(self.prompt, self.completion, self.system)


@dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, and what tools there were."""

    messages: tuple[Message, ...]
    tools: Sequence[Any] | None = None

    def until(self, count: int) -> Conversation:
        """Its first messages."""
        return Conversation(self.messages[:count], self.tools)

    @property
    def answers(self) -> list[int]:
        """The places of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == ASSISTANT]

    @property
    def replies(self) -> int:
        """Stretches in which the assistant speaks, calls tools and hears what they say, between what others say."""
        roles = [message["role"] for message in self.messages]
        own = [role in (ASSISTANT, "tool") for role in roles]
        return sum(now and not before for before, now in zip([False, *own], own, strict=False))

    def learnt(self, *, last: bool) -> list[int]:
        """Of these the ones to be learnt: but for those with a `weight` of 0, and all or the last."""
        weighty = [place for place in self.answers if self.messages[place].get("weight", 1) != 0]
        return weighty[-1:] if last else weighty


def asked(prompt: str, completion: str, system: str = "") -> Conversation:
    """One turn of a user, and the assistant's answer."""
    return Conversation((*_system(system), _message("user", prompt), _message(ASSISTANT, completion)))


def conversation_of(messages: Any, row: Row, *, system: str = "", tools: Any = None) -> Conversation:
    """The conversation in a row.

    Args:
        messages: A list of `{"role": ..., "content": ...}`, or of `{"from": ..., "value": ...}` as ShareGPT has them.
        row: Where it is from.
        system: What the assistant is told first, unless the messages begin with that themselves.
        tools: What it may call, as the template takes them.

    Raises:
        DataError: It is none.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise row.error(f"must hold a list of messages, not {messages!r:.60}")
    found = tuple(_normal(one, row) for one in messages)
    own = () if found[0]["role"] in ("system", "developer") else _system(system)
    return Conversation((*own, *found), tools or None)


def _normal(message: Any, row: Row) -> Message:
    if not isinstance(message, Mapping):
        raise row.error(f"holds {message!r:.60}, which is no message with a role and a content")
    told = message.get("role", message.get("from"))
    role = _ROLES.get(str(told).casefold())
    if role is None:
        raise row.error(f"holds a message of the role {told!r}; expected one of {', '.join(_ROLES)}")
    content = _plain(message.get("content", message.get("value")))
    told_apart = ("role", "from", "content", "value")
    rest = {key: value for key, value in message.items() if key not in told_apart and value not in (None, "", [])}
    if content is None and not rest.get(CALLS):
        raise row.error(f"holds a message of the role {told!r} without text; expected 'content' or 'value'")
    return {"role": role, "content": content or "", **rest}


def _plain(content: Any) -> str | None:
    """The text of a content, also where it is in parts; None where it is no text."""
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else None


def _system(text: str) -> tuple[Message, ...]:
    return (_message("system", text),) if text else ()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
