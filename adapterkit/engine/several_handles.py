"""One module with the adapters of several handles, which know nothing of each other.

A handle on a model and one on a part of it, or on pipelines that share a part, have adapters, selections and side
inputs of their own. Where they meet in a module, the later act around the earlier, as around a base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract.layer import LayerHandler
from adapterkit.engine.first_call import place
from adapterkit.engine.folding import Part
from adapterkit.engine.nesting import Around, nested
from adapterkit.engine.site import Site, read_parameter
from adapterkit.kernels.sums import Active
from adapterkit.points import InjectionPoint, Span


class SiteStack:
    """The sites of one module, the innermost first. It stands where a module has its only site otherwise."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)

    @property
    def base(self) -> type[nn.Module]:
        """The module's own class."""
        return self.sites[0].base

    @property
    def handler(self) -> LayerHandler | None:
        """See `Site`."""
        return self.sites[0].handler

    @property
    def read(self) -> frozenset[str]:
        """Names of the parameters that the model reads and that any of the adapters acts in."""
        return frozenset[str]().union(*(site.read for site in self.sites))

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The adapted module's forward."""
        for site in self.sites:
            if not (torch.compiler.is_dynamo_compiling() or site.placed):
                place(site, module)
        plans = [plan for site in self.sites if (plan := site.plan) is not None]
        instead = next((plan.instead for plan in plans if plan.instead is not None), None)
        run = forward if instead is None else functools.partial(instead, module)
        for around in (around for plan in plans if (around := nested(plan.arounds, None)) is not None):
            run = functools.partial(_called, around, module, run)
        return run(*args, **kwargs)

    def extend(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Extension`."""
        for site in self.sites:
            before = keys
            keys, values, mask = site.extend(keys, values, mask, queries=queries, causal=causal)
            causal = causal and keys is before  # what was extended has a mask that says so
        return keys, values, mask

    @property
    def kv_heads(self) -> int:
        """See `Extension`."""
        return max(site.kv_heads for site in self.sites)

    @property
    def counted(self) -> bool:
        """See `Extension`."""
        return any(site.counted for site in self.sites)

    @property
    def padded(self) -> bool:
        """See `Extension`."""
        return any(site.padded for site in self.sites)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """See `Extension`."""
        for site in self.sites:
            output = site.attend(query, keys, values, output, scale=scale)
        return output

    def parameter(self, module: nn.Module, name: str) -> Any:
        """What the model gets when it reads a parameter."""
        parts = _joined([part for site in self.sites for part in site.parts(name)])
        inside = any(site.switch.inside for site in self.sites)
        return read_parameter(module, name, parts, inside=inside)


def _called(around: Around, module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return around(module, run, args, kwargs)


def _joined(parts: Sequence[Part]) -> Sequence[Part]:
    """The same, with what acts at one part of a weight together."""
    found: dict[tuple[Span | None, Span | None, int | None], tuple[InjectionPoint, Active]] = {}
    for point, active in parts:
        place = (point.span, point.in_span, getattr(point.layout, "index", None))
        first, already = found.get(place, (point, ()))
        found[place] = (first, [*already, *active])
    return [*found.values()]
