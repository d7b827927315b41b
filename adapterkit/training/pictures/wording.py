"""What is said of a picture when it is drawn: its caption with a trigger, its tags shuffled or left out, or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_PLACE = "[trigger]"


@dataclass(frozen=True)
class Wording:
    """How a caption becomes a prompt.

    Attributes:
        trigger: Stands in front, unless the caption says it already, or in place of `[trigger]`.
        dropout: Probability that nothing is said at all.
        shuffle: Whether tags change their order.
        tag_dropout: Probability that a tag is left out.
        keep: How many tags at the beginning stay where they are; a trigger in front stays too.
        separator: Stands between tags.
    """

    trigger: str = ""
    dropout: float = 0.0
    shuffle: bool = False
    tag_dropout: float = 0.0
    keep: int = 0
    separator: str = ","

    @property
    def fixed(self) -> bool:
        """Whether a caption is said in one way, or not at all."""
        return not (self.shuffle or self.tag_dropout)

    def whole(self, caption: str) -> str:
        """The caption with its trigger, and nothing left out."""
        return self._with_trigger(caption)[1]

    def said(self, caption: str, generator: torch.Generator) -> str:
        """The caption as one draw says it; always as many random numbers are drawn."""
        order = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if float(torch.rand((), generator=generator)) < self.dropout:
            return ""
        added, text = self._with_trigger(caption)
        if self.fixed:
            return text
        tags = [tag for part in text.split(self.separator) if (tag := part.strip())]
        kept = min(self.keep + added, len(tags))
        first, rest = tags[:kept], tags[kept:]
        if self.shuffle:
            rest = [rest[place] for place in torch.randperm(len(rest), generator=order).tolist()]
        stays = torch.rand(len(rest), generator=order) >= self.tag_dropout
        return f"{self.separator.strip()} ".join(
            [*first, *(tag for tag, here in zip(rest, stays.tolist(), strict=True) if here)]
        )

    def _with_trigger(self, caption: str) -> tuple[bool, str]:
        """Whether the trigger is a tag of its own in front, and the text."""
        if _PLACE in caption:
            return False, caption.replace(_PLACE, self.trigger)
        if not self.trigger or re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", caption):
            return False, caption
        return True, f"{self.trigger}{self.separator.strip()} {caption}" if caption else self.trigger
