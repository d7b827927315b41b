"""What low-rank types share: two thin factors, how they start, and how training may drop them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule
from adapterkit.adapters.starts import covariance_of, directions, from_covariance, from_gradient
from adapterkit.contract.config import BaseValues
from adapterkit.contract.factors import Factors
from adapterkit.errors import ConfigError
from adapterkit.kernels import low_rank
from adapterkit.kernels.weights import apply_weight, weight_gradient
from adapterkit.points import InjectionPoint

FROM_BASE = ("pissa", "olora")
FROM_DATA = ("eva", "corda", "corda_knowledge", "lora_ga")
INITS = ("default", "gaussian", "orthogonal", *FROM_BASE, *FROM_DATA)
KEPT = (*FROM_BASE, "corda", "corda_knowledge", "lora_ga")
_OVERSAMPLING = 2
_MORE = "show more data in observing()"


class LowRank(AdapterModule):
    """`update(x) = scale * B(A(x))`: A [rank, in / groups, *kernel] computes as the module does, B [out, rank] mixes.

    Where neither factor starts at zero (`KEPT`), their start is kept, as the buffers A0 and B0, and the update is
    `scale * (B A - B0 A0)`: the base itself stays what it is, and the update starts at exactly zero.

    Args:
        point: Where.
        rank: Rows of A.
        scale: Factor on the update.
        dropout: Of the elements of x, in training; at an embedding, of the rows that A looks up.
        rank_dropout: Of whole ranks, for each sample; what is kept is scaled up.
        module_dropout: Probability of dropping the whole update; what is kept is not scaled up.
        init: One of `INITS`.
    """

    layout: Any
    scale: float
    init: str
    dropout: nn.Dropout | None  # no Identity: a load makes what is there at each point
    rank_dropout: float
    module_dropout: float
    _drops: bool
    _update: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    _kept: bool
    _seen: Tensor | None = None
    _calls = 0

    def __init__(
        self,
        point: InjectionPoint,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        init: str = "default",
    ) -> None:
        super().__init__()
        out, *rest = point.shape
        # Attributes like any others; torch's way to set one takes 2 us, and there are thousands of points.
        self.__dict__.update(
            layout=point.layout,
            scale=scale,
            init=init,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            from_base=init in FROM_BASE,
            _drops=bool(dropout or rank_dropout or module_dropout),
            _update=low_rank.update_of(point.layout),
            _kept=init in KEPT,
        )
        self.A, self.B = nn.Parameter(torch.zeros(rank, *rest)), nn.Parameter(torch.zeros(out, rank))
        if dropout:
            self.dropout = nn.Dropout(dropout)
        else:
            self.__dict__["dropout"] = None  # not on the class, where it would stand before a child of that name
        self._start()
        if self._kept:
            self.register_buffer("A0", torch.zeros(rank, *rest))
            self.register_buffer("B0", torch.zeros(out, rank))

    def _start(self) -> None:
        if self.layout.form == "embedding":
            nn.init.normal_(self.B)
        elif self.init == "gaussian":
            nn.init.normal_(self.A, std=1 / len(self.A))
        elif self.init == "orthogonal":
            nn.init.orthogonal_(self.A)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`: the weight's principal part (PiSSA), or its first QR factors (OLoRA)."""
        rank, matrix = len(self.A), weight.flatten(1)
        if self.init == "pissa":
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            root = (s[:rank] / self.scale).sqrt()
            b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
        elif self.init == "olora":
            q, r = torch.linalg.qr(matrix)
            b, a = q[:, :rank], r[:rank]
        else:
            return
        self.begin(a, b)

    def begin(self, a: Tensor, b: Tensor | None) -> None:
        """Sets the factors from A, [rank, in / groups * kernel] or as it is, and B; None leaves B."""
        for name, value in (("A", a), ("B", b)):
            if value is not None:
                factor: Tensor = getattr(self, name)
                factor.copy_(value.view_as(factor))
                if f"{name}0" in self._buffers:
                    getattr(self, f"{name}0").copy_(factor)

    # -- from data ----------------------------------------------------------------------------------------------------

    def observe(self, x: Tensor) -> None:
        """Keeps the principal directions of the inputs seen so far, scaled; or the sum of their covariances."""
        if self.init not in FROM_DATA or self.init == "lora_ga":
            return
        rows = self._rows(x).to(torch.promote_types(x.dtype, torch.float32))
        if self.init != "eva":
            self._add(covariance_of(rows))
            return
        seen = rows if self._seen is None else torch.cat([self._seen, rows])
        _, s, vh = torch.linalg.svd(seen, full_matrices=False)
        kept = _OVERSAMPLING * len(self.A)
        self._seen = s[:kept, None] * vh[:kept]

    def observe_gradient(self, x: Tensor, grad: Tensor) -> None:
        """Keeps the sum of the weight's gradients, [out, in / groups * kernel]."""
        if self.init == "lora_ga":
            wide = torch.promote_types(grad.dtype, torch.float32)
            shape = (len(self.B), *self.A.shape[1:])
            self._add(weight_gradient(x.to(wide), grad.to(wide), shape, self.layout).flatten(1))

    def _add(self, term: Tensor) -> None:
        self._seen = term if self._seen is None else self._seen.add_(term)
        self._calls += 1

    def forget(self) -> None:
        self._seen, self._calls = None, 0

    def _rows(self, x: Tensor) -> Tensor:
        """What each row of A is multiplied with: [n, in / groups * kernel]."""
        width = self.A[0].numel()
        if self.layout.form != "conv":
            return x.reshape(-1, width)
        identity = torch.eye(width, dtype=x.dtype, device=x.device).view(width, *self.A.shape[1:])
        patches = apply_weight(x, identity, self.layout).unflatten(1, (self.layout.groups, width))
        return patches.movedim(2, -1).reshape(-1, width)

    def start_from_data(self, key: str, base: BaseValues) -> tuple[Tensor, Tensor | None]:
        """What A and B are to be after observing; B None to leave it.

        Raises:
            ConfigError: Too little was seen, or the adapter has been trained already.
        """
        seen, calls, rank = self._seen, self._calls, len(self.A)
        self.forget()
        if bool(self.B.any()):
            raise self._refused(
                f"{key}: B is not zero: a trained adapter would lose what it has learnt; observe before training"
            )
        if self.init == "eva":
            norms = torch.zeros(0) if seen is None else seen.norm(dim=1)
            if seen is None or (found := directions(norms)) < rank:
                found = 0 if seen is None else found
                raise self._refused(f"{key}: the inputs had {found} directions, and rank is {rank}; {_MORE}")
            return seen[:rank] / norms[:rank, None], None
        if seen is None:
            what = "gradients: run backward on the loss" if self.init == "lora_ga" else "inputs: run the model"
            raise self._refused(f"{key}: it was shown no {what} inside observing()")
        if self.init == "lora_ga":
            factors = from_gradient(seen, rank)
            if isinstance(factors, int):
                raise self._refused(f"{key}: the gradient has {factors} directions, and 2 x {rank} are needed; {_MORE}")
            return factors
        weight, last = base(key)[0].flatten(1), self.init == "corda_knowledge"
        return from_covariance(weight, (seen / calls).to(weight), rank, self.scale, last=last)

    def _refused(self, told: str) -> ConfigError:
        return ConfigError([told], f"init={self.init!r}")

    # -- the update ---------------------------------------------------------------------------------------------------

    @property
    def dropping(self) -> bool:
        """Whether a part of the update is dropped now."""
        return self.training and self._drops

    def product(self) -> Factors:
        """The update, dropout aside, with the factors' starts in it."""
        return Factors(*self._pair(), self.layout, self.scale)

    def _pair(self) -> tuple[Tensor, Tensor]:
        if not self._kept:
            return self.A, self.B
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): exactly zero while neither has moved.
        a0, b0 = cast("Tensor", self.A0), cast("Tensor", self.B0)
        return torch.cat([self.A, self.A - a0]), torch.cat([self.B - b0, b0], dim=1)

    def update(self, x: Tensor) -> Tensor:
        """What is added."""
        own = self.__dict__  # by key: every point of a forward asks, and a module's attributes are slow
        if own["training"] and own["_drops"]:
            return self._dropped(x)
        a, b = own["_parameters"].get("A"), own["_parameters"].get("B")
        if own["_kept"] or a is None or b is None:  # None where it is no parameter now: parametrized, or a replica's
            a, b = self._pair()
        return own["_update"](x, a, b, own["scale"])

    def _dropped(self, x: Tensor) -> Tensor:
        """What is added where training drops a part of it."""
        product, layout = self.product(), self.layout
        if layout.form == "embedding":
            h = self._thinned(low_rank.reduced(x, product.A, layout))
        else:
            h = low_rank.reduced(self._thinned(x), product.A, layout)
        if self.rank_dropout:
            h = h * self._kept_ranks(h)
        y = low_rank.expanded(h, product.B, layout, product.scale)
        if self.module_dropout:
            y = y * (torch.rand((), device=y.device) >= self.module_dropout)
        return y

    def _thinned(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)

    def _kept_ranks(self, h: Tensor) -> Tensor:
        """A mask for each sample and rank, in the dtype of h [batch, ..., ranks] (or [batch, ranks, ...])."""
        axis = -1 - len(self.layout.kernel)
        shape = [1] * h.ndim
        shape[0], shape[axis] = (h.shape[0] if h.ndim > 1 else 1), len(self.A)
        kept = nn.functional.dropout(h.new_ones(shape), self.rank_dropout)
        # A start of its own, and the groups of a convolution, repeat the ranks.
        return torch.cat([kept] * (h.shape[axis] // len(self.A)), dim=axis)
