"""Adapter modules that are right but for one thing each."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import WeightLayout
from tests.testing.shift import Attends, Good, Sided

_COUNTER = itertools.count()


class EffectAtStart(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) + 1


class NoEffect(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * 0


class IdleParameter(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.idle = nn.Parameter(torch.zeros(2))


class WrongGradient(Good):
    def delta(self, x: Tensor) -> Tensor:
        y = super().delta(x)
        return y + y.detach().square()


class OtherInTraining(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * (2 if self.training else 1)


class WrongMerge(Good):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class ChangedByMerging(Good):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found = super().merged(weight, bias)
        self.shift.data.add_(1)
        return found


class MixesRows(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y + self.delta(x) + 0.1 * self.shift.sum() * y.mean(0, keepdim=True)


class MixesGradients(Good):
    """Right in every value: what it adds is zero, but its gradient is a sum over the batch."""

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) + (self.shift - self.shift.detach()) * x.detach().sum()


class FirstComeFirstServed(Good):
    """Two adapters at one point: the one that is called after the other gives nothing."""

    last: dict[str, int] = {}

    def delta(self, x: Tensor) -> Tensor:
        before = self.last.get(self.at, id(self))
        self.last[self.at] = id(self)
        return super().delta(x) * (before == id(self))


class WrongFactors(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.width = point.in_features

    def factors(self) -> ak.Factors:
        out = len(self.shift)
        return ak.Factors(self.shift.new_ones(1, self.width), self.shift.new_ones(out, 1), WeightLayout("linear"))


class NotASum(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = base(x)
        return y + y * self.delta(x)


class Random(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * torch.rand(())


class ForgetsState(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.scale = [1.0]

    def delta(self, x: Tensor) -> Tensor:
        self.scale[0] += 1.0
        return super().delta(x) * self.scale[0]


class LastSetting(Good):
    """Keeps its setting for all of its kind."""

    amount = 1

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * LastSetting.amount


def build_last(config: Any, point: ak.InjectionPoint) -> ak.AdapterModule:
    LastSetting.amount = config.amount
    return LastSetting(point)


class ChangesBase(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        y = super().forward(x, base)
        base.weight.data.mul_(1.01)
        return y


class Unsaved(Good):
    """What it takes from the base is in no file."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.size = 1.0

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        self.size = 1 + float(weight.abs().max())

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * self.size


class Lenient(Good):
    """Has a tensor at one point that it does not ask a file for."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        if point.id == "attn.q@toy.0" and not self.shift.is_meta:
            self.register_buffer("more", torch.zeros(2))


class NoBuffer(Good):
    """Keeps a tensor that is no buffer: it stays on the meta device, and does not move."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.ones = torch.ones(point.out_features)

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * self.ones


class Allocates(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.register_buffer("more", torch.zeros(2, device="cpu"))


class Unpicklable(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.function = lambda y: y


class NotCopied(Good):
    def __deepcopy__(self, memo: Any) -> NotCopied:
        return self


class NumberedStart(Good):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.shift.data.fill_(next(_COUNTER) * 1e-9)


class Hidden(Good):
    def __repr__(self) -> str:
        return "()"


class Upcasts(Good):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return base(x) + self.delta(x)


class NoHalf(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) * torch.linalg.det(torch.eye(2, dtype=self.shift.dtype))


class LosesDigits(Good):
    def delta(self, x: Tensor) -> Tensor:
        return super().delta(x) + (x.sum(-1, keepdim=True) + 1000 - 1000)


class NoAutocast(Good):
    def delta(self, x: Tensor) -> Tensor:
        h = F.linear(x, torch.eye(x.shape[-1], dtype=x.dtype))
        zero = torch.zeros_like(x).index_add_(0, torch.arange(len(h)), h)
        return super().delta(x) + 0 * zero.sum()


class KeepsDtype(Good):
    kept: Tensor | None = None

    def delta(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.eye(x.shape[-1], dtype=x.dtype)
        return super().delta(x) + 0 * F.linear(x, self.kept).sum()


class EveryOtherCall(Good):
    calls = 0

    def delta(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().delta(x) * (self.calls % 2)


class GraphBreak(Good):
    def delta(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().delta(x)


class KeepsInput(Good):
    def delta(self, x: Tensor) -> Tensor:
        self.x = x
        time.sleep(0.002)
        return super().delta(self.x)


class FailsInThreads(Good):
    def delta(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("in a thread")
        return super().delta(x)


class HeldOnMeta(Good):
    """Where a file is loaded, modules are built on the meta device."""

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__(point)
        self.shift.requires_grad_(not self.shift.is_meta)


class ChangesInputs(Good):
    def observe(self, x: Tensor) -> None:
        x.mul_(2)


class NeverReads(Sided):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return self.shifted(x, base, torch.ones(len(x)))


class KeepsTheFirst(Sided):
    kept: Tensor | None = None

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.kept = base.context["side"] if self.kept is None else self.kept
        return self.shifted(x, base, self.kept)


class MixesSides(Sided):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return self.shifted(x, base, base.context["side"] - base.context["side"].mean())


class WritesSides(Sided):
    def forward(self, x: Tensor, base: Any) -> Tensor:
        return self.shifted(x, base, base.context["side"].mul_(1))


class MoreEachTime(Sided):
    calls = 0

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.calls += 1
        return self.shifted(x, base, base.context["side"] * self.calls)


class AttendsToOtherRows(Attends):
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        return super().attend(query, keys, values, base) + 0.1 * self.shift.sum() * values.mean()


class AttendsInOneShape(Attends):
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        return super().attend(query, keys, values, base)[:, :, :4]
