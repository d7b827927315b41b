"""C3A: an update of circulant blocks (Chen et al. 2024, arXiv:2407.19342)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import Kind

_STARTS = ("zeros", "gaussian", "kaiming_uniform", "xavier_uniform")
_MAX_BLOCK = 2**16


class C3AModule(ak.AdditiveModule):
    """`W + D / in`: block (m, n) of D is circulant, `D[p, q] = kernel[m, n, (q - p) mod b]`.

    `kernel` is [out / b, in / b, b], and its product with an input a circular correlation, by Fourier transform.
    """

    def __init__(self, point: ak.InjectionPoint, block: int, start: str) -> None:
        super().__init__()
        self.shape = point.shape
        out, inputs = point.shape
        self.kernel = nn.Parameter(torch.zeros(out // block, inputs // block, block))
        if self.kernel.is_meta:
            return
        if start == "gaussian":
            nn.init.normal_(self.kernel)
        elif start != "zeros":
            bound = math.sqrt(6 / (inputs + out)) if start == "xavier_uniform" else math.sqrt(1 / inputs)
            nn.init.uniform_(self.kernel, -bound, bound)

    def delta(self, x: Tensor) -> Tensor:
        kernel = self.kernel / self.shape[1]
        wide = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)  # as the transform asks
        block = kernel.shape[-1]
        spectrum = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, block)))
        mixed = torch.einsum("...nk,mnk->...mk", spectrum, torch.fft.rfft(kernel.to(wide)).conj())
        return torch.fft.irfft(mixed, n=block).flatten(-2)

    def delta_weight(self) -> Tensor:
        places = torch.arange(self.kernel.shape[-1], device=self.kernel.device)
        blocks = (self.kernel / self.shape[1])[..., (places - places[:, None]) % len(places)]
        return blocks.transpose(1, 2).reshape(self.shape)


@dataclass(frozen=True)
class C3A(ak.AdapterConfig):
    """`W + D / in` with circulant blocks in D: in * out / block numbers, and an update of any rank.

    Attributes:
        block: b, which divides the point's inputs and outputs. None for the largest that does.
        start: Of the numbers: zeros, gaussian, kaiming_uniform or xavier_uniform (PEFT's).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t"})
    targets: str = "attention"
    block: int | None = None
    start: str = "zeros"

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether it starts from zeros."""
        return self.start == "zeros"

    def problems(self) -> list[str]:
        found = []
        if self.block is not None and not 1 <= self.block <= _MAX_BLOCK:
            found.append(f"block must be None or from 1 to {_MAX_BLOCK}, not {self.block!r}")
        if self.start not in _STARTS:
            found.append(f"start must be one of {', '.join(_STARTS)}, not {self.start!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if reason := super().accepts(point):
            return reason
        common = math.gcd(*point.shape)
        if common % (self.block or 1):
            return f"block {self.block} does not divide both sides of its weight {point.shape}: set it to {common}"
        return None

    def alike(self, point: ak.InjectionPoint) -> tuple[Hashable, ...]:
        return (point.shape, self.block, self.start)

    def build(self, point: ak.InjectionPoint) -> C3AModule:
        return C3AModule(point, self.block or math.gcd(*point.shape), self.start)
