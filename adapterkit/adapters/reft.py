"""ReFT: editing the hidden states between blocks in a small subspace."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Base
from adapterkit.adapters.sublayer_net import ACTIVATIONS, one_of
from adapterkit.errors import did_you_mean
from adapterkit.kernels.packed_documents import Documents
from adapterkit.points import InjectionPoint, Kind, OutputPoint

FORMS = ("loreft", "noreft", "direft")
_MAX_RANK, _MAX_POSITIONS = 2**12, 2**16


class Edit(nn.Module):
    """What is added to a hidden state h [..., d]; see `ReFT` for the equations.

    Attributes:
        source, bias: W [rank, d] and b [rank].
        projection: R [rank, d]; in the form `loreft` its rows are made orthonormal in every forward.
    """

    def __init__(self, features: int, rank: int, form: str, activation: str | None = None) -> None:
        super().__init__()
        self.form, self.activation = form, activation
        self.projection = nn.Parameter(torch.zeros(rank, features))
        self.source = nn.Parameter(torch.empty(rank, features))
        self.bias = nn.Parameter(torch.zeros(rank))
        if form == "direft":
            nn.init.kaiming_uniform_(self.source, a=5**0.5)
        else:  # W = R and b = 0: no effect at first
            start = nn.init.orthogonal_(torch.empty(rank, features)) if features >= rank else torch.eye(rank, features)
            self.projection.data.copy_(start)
            self.source.data.copy_(start)

    def forward(self, h: Tensor) -> Tensor:
        """In h's dtype."""
        r = (orthonormal(self.projection) if self.form == "loreft" else self.projection).to(h.dtype)
        low = nn.functional.linear(h, self.source.to(h.dtype), self.bias.to(h.dtype))
        if self.activation is not None:
            low = ACTIVATIONS[self.activation](low)
        if self.form != "direft":
            low = low - nn.functional.linear(h, r)
        return low @ r


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal rows that span those of a matrix [rank, d]; rows that are orthonormal stay as they are."""
    q, r = torch.linalg.qr(matrix.mT.to(torch.promote_types(matrix.dtype, torch.float32)))
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return (q * sign).mT.to(matrix.dtype)


class ReFTModule(AdapterModule):
    """Edits the first `prefix` and the last `suffix` tokens, or all where neither is given.

    Args:
        features: d.
        rank: Of the subspace.
        form: One of `FORMS`.
        prefix, suffix: Tokens; None for none.
        tied: Whether both ends have the same edit.
        activation: On W h + b; None for none.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        form: str,
        prefix: int | None,
        suffix: int | None,
        tied: bool,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.prefix, self.suffix = prefix, suffix
        self.positional = prefix is not None or suffix is not None
        self.first = Edit(features, rank, form, activation)
        self.last = Edit(features, rank, form, activation) if prefix and suffix and not tied else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """See `AdapterModule.forward`. The block's output is [batch, length, d]."""
        h = base(x)
        if self.prefix is None and self.suffix is None:
            return h + self.first(h)
        documents: Documents | None = getattr(base, "documents", None)
        if documents is not None:
            return self._in_documents(h, documents)
        length = h.shape[-2]
        prefix = min(self.prefix or 0, length)
        suffix = min(self.suffix or 0, length - prefix)  # a token that both ends reach is edited once
        begin, middle, end = h.split([prefix, length - prefix - suffix, suffix], dim=-2)
        last = self.first if self.last is None else self.last
        return torch.cat([begin + self.first(begin), middle, end + last(end)], dim=-2)

    def _in_documents(self, h: Tensor, documents: Documents) -> Tensor:
        begin = (documents.from_start < (self.prefix or 0))[..., None]
        end = (documents.from_end < (self.suffix or 0))[..., None]
        first = self.first(h)
        last = first if self.last is None else self.last(h)
        return h + torch.where(begin, first, torch.where(end, last, torch.zeros_like(h)))


@dataclass(frozen=True)
class ReFT(AdapterConfig):
    """Representation finetuning (Wu et al. 2024, arXiv:2404.03592): edits of a block's output h, in `rank` dimensions.

        loreft   h + R^T (W h + b - R h), the rows of R orthonormal (eq. 2)
        noreft   the same without orthonormal rows
        direft   h + R^T (W h + b) (eq. 3)

    Positions are those of each row's own tokens: padding does not count, and of several documents in a row each has its
    first and its last. They are those that a forward is given: with a cache, each later forward has one token, which is
    then its first and its last. Edit all tokens where that would matter.

    Attributes:
        targets: Outputs of whole blocks: "hidden", "hidden@layer>=8".
        form: One of the three above.
        rank: Of the subspace.
        prefix, suffix: Edit this many of the first, and of the last tokens only; all where both are None.
        tied: Whether first and last tokens share an edit.
        activation: Of `Bottleneck`'s, on W h + b; there is then an effect from the start. None for none.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    targets: str = "hidden"
    form: str = "loreft"
    rank: int = 4
    prefix: int | None = None
    suffix: int | None = None
    tied: bool = True
    activation: str | None = None

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether W h + b stays what it is."""
        return self.activation is None or self.form == "direft"

    def problems(self) -> list[str]:
        found = []
        if self.form not in FORMS:
            found.append(f"form must be one of {', '.join(FORMS)}, not {self.form!r}.{did_you_mean(self.form, FORMS)}")
        if self.activation is not None:
            found += one_of("activation", self.activation, ACTIVATIONS)
        if not 1 <= self.rank <= _MAX_RANK:
            found.append(f"rank must be from 1 to {_MAX_RANK}, not {self.rank!r}")
        for name in ("prefix", "suffix"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_POSITIONS:
                found.append(f"{name} must be None or from 1 to {_MAX_POSITIONS}, not {value!r}")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if isinstance(point, OutputPoint) and not point.is_block:
            return "ReFT edits what a whole block gives, and this is a sublayer before its residual add; use 'hidden'"
        if self.rank > point.out_features:
            return f"rank must be at most the width of the hidden states, {point.out_features}, not {self.rank}"
        return super().accepts(point)

    def alike(self, point: InjectionPoint) -> Hashable:
        return (point.out_features, self.rank, self.form, self.prefix, self.suffix, self.tied, self.activation)

    def build(self, point: InjectionPoint) -> ReFTModule:
        return ReFTModule(
            point.out_features, self.rank, self.form, self.prefix, self.suffix, self.tied, self.activation
        )
