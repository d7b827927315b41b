"""Multitask prompt tuning: a prompt of all tasks, times a low-rank one of each (Wang et al. 2023, arXiv:2303.02861)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.base import Beside
from adapterkit.points import Kind, TokensPoint

_MAX_LENGTH = _MAX_TASKS = _MAX_RANK = 2**16


class MultitaskPromptModule(ak.AdapterModule):
    """`prompt * (columns rows)`: [length, features], and for each task [length, rank] and [rank, features]."""

    scalable = False

    def __init__(self, features: int, config: MultitaskPrompt) -> None:
        super().__init__()
        tasks, length, rank = config.tasks, config.length, config.rank
        self.padded = config.padded
        self.prompt = nn.Parameter(torch.randn(length, features))
        self.columns = nn.Parameter(torch.empty(tasks, length, rank).normal_(std=0.02))
        self.rows = nn.Parameter(torch.empty(tasks, rank, features).normal_(std=0.02))

    def lengthen(self, tokens: Tensor, base: Beside) -> Tensor:  # type: ignore[override]
        """See `AdapterModule.lengthen`: [batch, length, features], of each row's task."""
        task = base.context["task"]
        made = self.prompt * (self.columns[task] @ self.rows[task])
        return made.to(tokens.dtype).expand(len(tokens), -1, -1)


@dataclass(frozen=True)
class MultitaskPrompt(ak.AdapterConfig):
    """Prompts of tasks that share most of what they know: `with adapters.context(task=ids)` says each row's task.

    It acts or does not: its weight is 1. There is an effect from the start.

    Attributes:
        length: Positions.
        tasks: How many there are.
        rank: Of a task's own part.
        padded: See `Prompt.padded`.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    neutral: ClassVar[bool] = False
    targets: str = "prompt"
    length: int = 20
    tasks: int = 1
    rank: int = 1
    padded: bool = False

    def problems(self) -> list[str]:
        found = []
        for name, most in (("length", _MAX_LENGTH), ("tasks", _MAX_TASKS), ("rank", _MAX_RANK)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"{name} must be from 1 to {most}, not {getattr(self, name)!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, TokensPoint) and not point.lengthens:
            return "the sequence cannot be made longer there; use 'prompt', where the family offers it"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> MultitaskPromptModule:
        return MultitaskPromptModule(point.out_features, self)

    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        """`task` [rows]."""
        return {"task": torch.randint(self.tasks, (rows,))}
