"""What a backend says of a sublayer's output, compared with what the model computes there.

A probe at every output point gives back the sublayer's output bit for bit, but cut off from the graph: what depends on
it is seen in gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import InjectionPoint, Kind, OutputPoint
from adapterkit.testing.subject import TIGHT, assert_close


@dataclass
class Seen:
    """What a probe saw in the last forward.

    Attributes:
        x: The residual stream that it was given, in the graph.
        stream: Its values then.
        output: The sublayer's output.
        cut: The same as a leaf of the graph, with which the model went on.
    """

    x: Tensor
    stream: Tensor
    output: Tensor
    cut: Tensor


class ProbeModule(ak.AdapterModule):
    """Changes nothing, and keeps what it sees."""

    seen: Seen | None = None

    def forward(self, x: Tensor, base: ak.adapter.Base) -> Tensor:
        """`base(x)`, cut off."""
        output = base(x)
        cut = output.detach().clone().requires_grad_()
        self.seen = Seen(x, x.detach().clone(), output, cut)
        return cut.clone()  # models add in place to what a sublayer gives them


@dataclass(frozen=True)
class Probe(ak.AdapterConfig):
    """A probe at sublayers' outputs; not at whole blocks."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    targets: str = "*"

    def accepts(self, point: InjectionPoint) -> str | None:
        return "a whole block has no residual stream beside it" if point.is_block else super().accepts(point)

    def build(self, point: InjectionPoint) -> ProbeModule:
        return ProbeModule()


@dataclass
class Probed:
    """A forward with probes.

    Attributes:
        seen: Point id -> what was seen there; nothing of a sublayer that did not run.
        entering, leaving: Point id -> what entered the norm before the sublayer, and that after it.
        output: The model's.
    """

    seen: dict[str, Seen] = field(default_factory=dict[str, Seen])
    entering: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    leaving: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    output: Tensor = field(default_factory=lambda: torch.zeros(()))


def sublayers(points: Iterable[InjectionPoint]) -> list[InjectionPoint]:
    """The output points that are no whole blocks."""
    return [point for point in points if isinstance(point, OutputPoint) and not point.is_block]


def probe(
    model: nn.Module, adapters: ak.Adapters, points: Sequence[InjectionPoint], run: Callable[[], Tensor]
) -> Probed:
    """Runs a model with probes that act at these points; every weight is in the graph.

    Args:
        model: Its weights require no grad.
        adapters: Its handle, with a `Probe` called `probe`.
        points: Some of the probe's.
        run: The model's output.
    """
    found, ids = Probed(), {point.id for point in points}
    modules: dict[str, Any] = dict(adapters.modules("probe"))
    for module in modules.values():
        module.seen = None
    handles = [handle for point in points for handle in _watch(model, point, found)]
    model.requires_grad_(True)
    try:
        with adapters.activated({"probe": lambda point, step: float(point.id in ids)}):
            found.output = run()
    finally:
        model.requires_grad_(False)
        for handle in handles:
            handle.remove()
    found.seen = {key: module.seen for key, module in modules.items() if module.seen is not None}
    return found


def _watch(model: nn.Module, point: InjectionPoint, found: Probed) -> Iterator[Any]:
    if isinstance(point, OutputPoint):
        layout = point.layout
        for path, into in ((layout.norm_in, found.entering), (layout.norm_out, found.leaving)):
            if path is not None:
                keep = functools.partial(_keep, into, point)
                yield model.get_submodule(path).register_forward_pre_hook(keep)


def _keep(into: dict[str, Tensor], point: InjectionPoint, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        x = args[0].movedim(1, -1) if point.channels_first else args[0]
        into[point.id] = x.detach().clone()


def check_stream(name: str, point: InjectionPoint, probed: Probed) -> None:
    """Raises AssertionError where x is not the residual stream beside the sublayer, as far as the norms tell."""
    told, seen = f"{name}: {point.id}", probed.seen[point.id]
    x, y = seen.stream, seen.output.detach()
    y = y.view(x.shape) if y.numel() == x.numel() else y  # a mixture of experts may give its tokens in one row
    assert x.shape == y.shape, f"{told}: x is {tuple(x.shape)}, and the sublayer's output {tuple(y.shape)}"
    width = point.out_features
    assert y.shape[-1] == width, f"{told} says {width} features, and the sublayer's output is {tuple(y.shape)}"
    if (entering := probed.entering.get(point.id)) is not None:
        assert_close(entering, x, TIGHT, f"{told}: what enters norm_in, and x")
    if (leaving := probed.leaving.get(point.id)) is not None:
        leaving = leaving.view(x.shape) if leaving.numel() == x.numel() else leaving
        assert_close(leaving, x + y, TIGHT, f"{told}: what enters norm_out, and x + the sublayer's output")


def check_order(name: str, first: InjectionPoint, second: InjectionPoint, probed: Probed) -> None:
    """Raises AssertionError where a sublayer computes with another's output, and its residual stream is without it."""
    before, after = probed.seen[first.id], probed.seen[second.id]
    assert not _depends(after.output, before.cut) or _depends(after.x, before.cut), (
        f"{name}: {second.id} computes with the output of {first.id}, and its x is without it; is `residual` the "
        "module that the stream enters just before the sublayer?"
    )


def check_beside(name: str, point: InjectionPoint, probed: Probed) -> None:
    """Raises AssertionError where the sublayer reaches the output, and x does not without it: it is cut off here."""
    seen = probed.seen[point.id]
    idle = not seen.x.requires_grad or not _depends(probed.output, seen.cut)
    assert idle or _depends(probed.output, seen.x), (
        f"{name}: the output of {point.id} is added to something else than its x; is `residual` the module that the "
        "stream enters first, such as the norm before the sublayer?"
    )


def _depends(tensor: Tensor, on: Tensor) -> bool:
    if not tensor.requires_grad:
        return False
    [grad] = torch.autograd.grad(tensor.sum(), [on], retain_graph=True, allow_unused=True)
    return grad is not None
