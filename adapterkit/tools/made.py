"""Updates as a checkpoint that any format can write: low-rank ones as LoRA, the rest as the model's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Said
from adapterkit.contract.factors import Factors
from adapterkit.errors import BaseMismatchError
from adapterkit.formats.parts import Collected
from adapterkit.kernels import low_rank_algebra


@dataclass(frozen=True)
class Update:
    """What a new adapter adds at one point.

    Attributes:
        key: The point's id.
        factors: To the weight; None for nothing.
        bias: To the bias.
        own: Parameters of the model's own, `weight` and perhaps `bias`, in the place of the base's.
    """

    key: str
    factors: Factors | None = None
    bias: Tensor | None = None
    own: Mapping[str, Tensor] | None = None


class Made:
    """An adapter that is put together, point by point. Every scale is 1, so that nothing hangs on how a file has alpha.

    Args:
        dtype: Of its tensors.
        source: Named in errors.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, source: object = None) -> None:
        self._dtype, self._source, self._found = dtype, source, Collected(source)

    def add(self, update: Update) -> None:
        """Adds an update at its point."""
        self._found.add(update.key, [*_said(update, self._dtype)])

    def keep(self, key: str, said: Sequence[Said]) -> None:
        """Adds what another adapter is at a point, as it is there."""
        self._found.add(key, said)

    def checkpoint(
        self,
        like: Sequence[Checkpoint],
        metadata: Mapping[str, str],
        shared: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Checkpoint:
        """The adapter.

        Args:
            like: Those that it is made from, for what is known of the base.
            metadata: Of the new one.
            shared: Type -> what the points of it that are kept share.

        Raises:
            BaseMismatchError: Those that it is made from are for different models.
        """
        base, backends = same_base(like, self._source), {k: v for one in like for k, v in one.backends.items()}
        return Checkpoint(self._found.parts(shared), base, backends, dict(metadata))


def _said(update: Update, dtype: torch.dtype) -> Iterator[Said]:
    if update.factors is not None:
        b, a = low_rank_algebra.matrices(update.factors)
        tensors = {"A": a.view(update.factors.A.shape), "B": b}
        yield Said("lora", {"rank": update.factors.rank, "alpha": None}, _cast(tensors, dtype))
    if update.own is not None:
        yield Said("trainable", {"part": "all" if "bias" in update.own else "weight"}, _cast(update.own, dtype))
    elif update.bias is not None:
        yield Said("trainable", {"part": "bias"}, _cast({"shift": update.bias}, dtype))


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def same_base(checkpoints: Sequence[Checkpoint], source: object = None) -> dict[str, dict[str, Any]]:
    """What all of these say of the model that they are for: what they touch together of each component.

    Raises:
        BaseMismatchError: They contradict each other.
    """
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in checkpoints:
        for component, made_for in checkpoint.base.items():
            found[component] = (
                _both(component, found[component], made_for, source) if component in found else {**made_for}
            )
    return found


def _both(component: str, one: Mapping[str, Any], other: Mapping[str, Any], source: object) -> dict[str, Any]:
    roles, more = ({**fingerprint.get("roles", {})} for fingerprint in (one, other))
    differing = {"family": (one.get("family"), other.get("family"))}
    differing |= {role: (count, more[role]) for role, count in roles.items() if role in more}
    if wrong := [f"{key} {a!r} and {b!r}" for key, (a, b) in differing.items() if a != b]:
        raise BaseMismatchError(f"they are for different models ({component}: {'; '.join(wrong)})", source, "base")
    together = {**one, "roles": {**roles, **more}}
    if one != other:  # other points: their number and shapes are nobody's
        together = {key: value for key, value in together.items() if key not in ("points", "shapes")}
    return together
