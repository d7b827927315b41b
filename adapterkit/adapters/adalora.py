"""AdaLoRA: low-rank updates whose ranks training hands out to the points where they matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.contract.factors import Factors
from adapterkit.points import InjectionPoint, Kind

_MAX_RANK, _MAX_SCALE, _MAX_STEPS = 2**12, 1e4, 10**9


class Count(nn.Module):
    """How many points there are: a penalty is the mean over them."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.points = points


class AdaLoRAModule(AdditiveModule):
    """`base(x) + scale * P diag(E) Q x`: Q [rank, in / groups, *kernel], E [rank], P [out, rank].

    The buffers are the moving averages of each rank's importance and of its change, and which ranks are kept.

    Args:
        point: Where.
        rank: Rows of Q.
        scale: Factor on the update.
        orthogonality: Factor on the penalty.
    """

    def __init__(self, point: InjectionPoint, rank: int, scale: float, orthogonality: float) -> None:
        super().__init__()
        out, *rest = point.shape
        self.layout, self.scale, self.orthogonality = point.layout, scale, orthogonality
        self.P, self.Q = nn.Parameter(torch.empty(out, rank)), nn.Parameter(torch.empty(rank, *rest))
        self.E = nn.Parameter(torch.zeros(rank))
        for factor in (self.P, self.Q):
            nn.init.normal_(factor, std=0.02)
        self.register_buffer("importance", torch.zeros(rank))
        self.register_buffer("uncertainty", torch.zeros(rank))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    def factors(self) -> Factors:
        return Factors(self.Q, self.P * self.E, self.layout, self.scale)

    def penalty(self) -> Tensor | None:
        """`||P^T P - I|| + ||Q Q^T - I||`, Frobenius, times `orthogonality` / 2 / points (after Zhang et al. 2023)."""
        if not self.orthogonality:
            return None
        q, identity = self.Q.flatten(1), torch.eye(len(self.E), dtype=self.E.dtype, device=self.E.device)
        apart = (self.P.mT @ self.P - identity).norm() + (q @ q.mT - identity).norm()
        return self.orthogonality / 2 / self.shared.points * apart

    def weigh(self, beta1: float, beta2: float) -> None:
        """Takes a step's gradients into the moving averages (eqs. 8 to 11, on the mean over each rank's elements)."""
        if self.P.grad is None or self.Q.grad is None or self.E.grad is None:
            return
        now = (self.E * self.E.grad).abs() + (self.P * self.P.grad).abs().mean(0)
        now += (self.Q * self.Q.grad).abs().flatten(1).mean(1)
        importance, uncertainty = cast("Tensor", self.importance), cast("Tensor", self.uncertainty)
        importance.lerp_(now, 1 - beta1)
        uncertainty.lerp_((now - importance).abs(), 1 - beta2)

    def score(self) -> Tensor:
        """[rank]: how much each matters."""
        return cast("Tensor", self.importance) * cast("Tensor", self.uncertainty)

    def keep(self, kept: Tensor) -> None:
        """Says which ranks may act: the others become zero."""
        cast("Tensor", self.kept).copy_(kept)
        self.cut()

    def cut(self) -> None:
        """Puts the ranks that are not kept back to zero."""
        self.E.mul_(cast("Tensor", self.kept))


@dataclass(frozen=True)
class AdaLoRA(AdapterConfig):
    """LoRA in the form of a singular value decomposition, with a budget of ranks (Zhang et al. 2023, arXiv:2303.10512).

    After `warmup` steps, the ranks that are kept fall from `initial` a point to `rank` a point on average, by a cubic
    schedule, and every `interval` steps the most important of all points are kept. In the last `final` steps
    the choice stands. Training with adapterkit's trainer, or calling `Adapters.after_step` and adding
    `Adapters.penalty`, does it. Where the number of all steps is not told, `rank` a point are kept after `warmup`.

    Attributes:
        rank: Average rank at the end.
        initial: Rank of every point at the start; by default half as much again.
        alpha: The update is scaled by alpha / initial; None means by 1.
        warmup, final: Steps.
        interval: Steps between two choices.
        beta1, beta2: Of the moving averages of importance and uncertainty.
        orthogonality: Factor on the penalty that keeps the factors orthogonal.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    initial: int | None = None
    alpha: float | None = None
    warmup: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        if self.initial is not None and not self.rank <= self.initial <= _MAX_RANK:
            found.append(f"initial must be from rank ({self.rank}) to {_MAX_RANK}, not {self.initial!r}")
        if self.alpha is not None and abs(self.alpha) > _MAX_SCALE * self.start:
            found.append(f"alpha / initial must be within {_MAX_SCALE:g}, not {self.alpha!r} / {self.start}")
        for name, least in (("warmup", 0), ("final", 0), ("interval", 1)):
            if not least <= getattr(self, name) <= _MAX_STEPS:
                found.append(f"{name} must be from {least} to {_MAX_STEPS}, not {getattr(self, name)!r}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} must be at least 0 and less than 1, not {getattr(self, name)!r}")
        if not 0 <= self.orthogonality <= _MAX_SCALE:
            found.append(f"orthogonality must be from 0 to {_MAX_SCALE:g}, not {self.orthogonality!r}")
        return found

    @property
    def start(self) -> int:
        """Rank of every point at the start."""
        return max(self.rank + 1, self.rank * 3 // 2) if self.initial is None else self.initial

    def accepts(self, point: InjectionPoint) -> str | None:
        if point.cuts_groups:
            return "AdaLoRA acts on whole grouped convolutions"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> AdaLoRAModule:
        scale = 1.0 if self.alpha is None else self.alpha / self.start
        return AdaLoRAModule(point, self.start, scale, self.orthogonality)

    def shared(self, points: Sequence[InjectionPoint]) -> Count:
        return Count(len(points))

    def after_step(self, modules: Mapping[str, AdapterModule], step: int, steps: int | None) -> None:
        steps = step + self.final if steps is None else steps  # without an end the budget is the last one at once
        own: list[Any] = [module for module in modules.values() if isinstance(module, AdaLoRAModule)]
        choosing = self.warmup < step <= max(self.warmup + 1, steps - self.final)
        for module in own:
            if step <= max(self.warmup + 1, steps - self.final):
                module.weigh(self.beta1, self.beta2)
        if choosing and (step % self.interval == 0 or step == steps - self.final):
            self._choose(own, self.budget(step, steps, len(own)))
        elif step > steps - self.final:
            for module in own:
                module.cut()

    def budget(self, step: int, steps: int, points: int) -> int:
        """Ranks of all points together at a step (eq. 12)."""
        first, last = self.start * points, self.rank * points
        left = steps - self.final - self.warmup
        done = 1.0 if left <= 0 else min(1.0, (step - self.warmup) / left)
        return last + round((first - last) * (1 - done) ** 3)

    @staticmethod
    def _choose(modules: list[AdaLoRAModule], budget: int) -> None:
        """Keeps the most important ranks, wherever they are; among equals the earlier."""
        scores = [module.score().cpu() for module in modules]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget]] = True
        for module, part in zip(modules, kept.split([len(score) for score in scores]), strict=True):
            module.keep(part.to(module.E.device))
