"""Poly: every task mixes low-rank skills of its own choice (Ponti et al. 2022, arXiv:2202.13914)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit_peft_types.ranked import Ranked

_MAX_TASKS, _MAX_SKILLS, _MAX_SPLITS, _SMALL = 2**16, 2**10, 2**8, 1e-12


class PolyModule(ak.AdapterModule):
    """`base(x) + B A x / rank`, where A and B are a task's mixtures of skills.

    A [splits, skills, in / splits, rank] and B [splits, skills, rank, out / splits]; `logits` [tasks, splits * skills]
    say how much of each skill a task has: `sigmoid`, divided by its sum over the skills. In training each is drawn from
    a relaxed Bernoulli distribution of temperature 1.
    """

    def __init__(self, point: ak.InjectionPoint, config: Poly) -> None:
        super().__init__()
        (out, width), (splits, skills, rank) = point.shape, (config.splits, config.skills, config.rank)
        self.skills = (splits, skills)
        self.A = nn.Parameter(torch.empty(splits, skills, width // splits, rank))
        self.B = nn.Parameter(torch.zeros(splits, skills, rank, out // splits))
        self.logits = nn.Parameter(torch.empty(config.tasks, splits * skills).uniform_(-1e-3, 1e-3))
        for matrix in self.A.data.flatten(0, 1):
            nn.init.kaiming_uniform_(matrix.mT, a=math.sqrt(5))

    def shares(self, task: Tensor) -> Tensor:
        """How much of each skill, [rows, splits, skills], for tasks [rows]."""
        logits = self.logits[task].unflatten(-1, self.skills)
        if self.training:
            found = RelaxedBernoulli(logits.new_ones(()), logits=logits).rsample()
        else:
            found = torch.sigmoid(logits)
        return found / (found.sum(-1, keepdim=True) + _SMALL)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        shares = self.shares(base.context["task"])
        a = torch.einsum("bqs,qsdr->bqdr", shares, self.A).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", shares, self.B).flatten(2)
        h = x.reshape(len(x), -1, x.shape[-1]) @ a.to(x.dtype)
        return y + (h @ b.to(x.dtype)).view(y.shape).to(y.dtype) / a.shape[-1]


@dataclass(frozen=True)
class Poly(Ranked):
    """Skills that tasks share: `with adapters.context(task=ids)` says which task each row is.

    Attributes:
        rank: Of a skill.
        tasks: How many there are.
        skills: How many there are.
        splits: Of a layer's inputs and outputs, each with shares of its own (multi-head routing, Caccia et al. 2022,
            arXiv:2211.03831).
    """

    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t"})
    rank: int = 8
    tasks: int = 1
    skills: int = 4
    splits: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        for name, most in (("tasks", _MAX_TASKS), ("skills", _MAX_SKILLS), ("splits", _MAX_SPLITS)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"{name} must be from 1 to {most}, not {getattr(self, name)!r}")
        if self.dropout:
            found.append("dropout must be left alone: Poly has none")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.is_read:
            return "rows have tasks of their own, and the model reads this weight once for all of them"
        if point.kind == "weight" and (point.shape[0] % self.splits or point.shape[1] % self.splits):
            return f"it is {point.shape[0]} x {point.shape[1]}, which splits={self.splits} does not divide"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> PolyModule:
        return PolyModule(point, self)

    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        """`task` [rows]."""
        return {"task": torch.randint(self.tasks, (rows,))}
