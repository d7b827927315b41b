"""What any type does to weights, as LoRA: exactly where it has factors, and otherwise the nearest of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Place, Said
from adapterkit.contract.factors import Factors
from adapterkit.errors import CheckpointError, NotMergeableError
from adapterkit.formats.low_rank import Made, module_of
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.kernels import low_rank_algebra
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import InjectionPoint, Points, WeightPoint

LORA = "lora"
RANK = 64
"""Of what is approximated, where nobody says another; less where less is exact."""
_NOTHING = 1e-6
"""Singular values below this part of the largest are rounding."""


class AsLoRA:
    """Turns what an adapter is at a point into LoRA.

    Args:
        checkpoint: The adapter.
        points: The model's, with the model where a type's effect depends on the base.
        where: What errors name.
        rank: Of approximations.

    Attributes:
        error: The largest so far: of all points the Frobenius norm of what is left out, relative to the whole.
    """

    def __init__(self, checkpoint: Checkpoint, points: Points, where: object = None, rank: int | None = None) -> None:
        self.error = 0.0
        self._checkpoint, self._where, self._rank = checkpoint, where, RANK if rank is None else rank
        self._points = {point.id: point for point in points}
        self._tensors = shared_of(checkpoint)
        self._shared: dict[str, nn.Module | None] = {}
        self._made: Made = {}

    def exact(self, place: Place, several: Sequence[Said]) -> Said | None:
        """LoRA that does the same as several types at a point; None where one of them has no factors."""
        found = [self._factors(self._module(place.point, one)) for one in several]
        factors = [one for one in found if one is not None]
        if len(factors) < len(found):
            return None
        return _lora(factors[0] if len(factors) == 1 else low_rank_algebra.concatenated(factors, [1.0] * len(factors)))

    @torch.no_grad()
    def nearest(self, place: Place, several: Sequence[Said]) -> Said:
        """The LoRA that is nearest to what several types do at a point together.

        Raises:
            CheckpointError: What they do is no change of a weight, or there is no model to tell which.
        """
        point = place.point
        if not isinstance(point, WeightPoint):
            raise CheckpointError(f"LoRA has no place at a {point.kind} point; native holds it", self._where, point.id)
        delta = sum((self._delta(place, one) for one in several), torch.zeros(point.shape)).flatten(1)
        found = low_rank_algebra.truncated(delta, min(self._rank, *delta.shape))
        found = found.cut(max(1, int((_NOTHING * found.S[0] < found.S).sum())))
        whole = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        self.error = max(self.error, low_rank_algebra.residual(delta, found) / whole if whole else 0.0)
        return _lora(found.factors(point.shape, point.layout))

    def _factors(self, module: AdapterModule) -> Factors | None:
        return module.factors() if isinstance(module, AdditiveModule) else None

    def _delta(self, place: Place, said: Said) -> Tensor:
        module, point = self._module(place.point, said), place.point
        if not module.abilities.merge:
            raise CheckpointError(f"{said.type} is no change of a weight; native holds it", self._where, point.id)
        try:
            weight, bias = self._base(module, place, said)
            merged, shifted = module.merged(weight, bias)
        except NotMergeableError as error:
            raise CheckpointError(f"{error}; native holds it", self._where, point.id) from error
        if shifted is not None and (bias is None or not torch.equal(shifted, bias)):
            raise CheckpointError(f"{said.type} changes the bias, as LoRA cannot", self._where, point.id)
        return merged - weight

    def _base(self, module: AdapterModule, place: Place, said: Said) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, AdditiveModule):
            return torch.zeros(place.point.shape), None
        if place.model is None:
            raise CheckpointError(f"what {said.type} does depends on the base", self._where, place.point.id)
        return place.model.values(place.point)

    def _module(self, point: InjectionPoint, said: Said) -> AdapterModule:
        module = module_of(said, point, self._where, self._made)
        if said.type not in self._shared:
            self._shared[said.type] = self._build_shared(said)
        if (shared := self._shared[said.type]) is not None:
            module.bind(shared)
        return module

    def _build_shared(self, said: Said) -> nn.Module | None:
        cls = class_of(get_plugin_manager().adapter(said.type), AdapterConfig)
        of_type = {
            key: {name: value for name, value in one.config.items() if said.config.get(name) != value}
            for key, own in said_of(self._checkpoint).items()
            for one in own
            if one.type == said.type and key in self._points
        }
        config = cls.from_dict({**said.config, "settings": of_type})
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
            shared = config.shared([self._points[key] for key in of_type])
        tensors = self._tensors.get(said.type, {})
        if shared is None and tensors:
            raise CheckpointError(f"{said.type} shares nothing between points, and the adapter does", self._where)
        if shared is None:
            return None
        shared.load_state_dict(dict(tensors), strict=True, assign=True)
        return shared.eval().requires_grad_(False)


def _lora(factors: Factors) -> Said:
    scale = factors.scale * factors.rank
    config: Mapping[str, object] = {"rank": factors.rank, "alpha": scale}
    return Said(LORA, config, {"A": factors.A.detach(), "B": factors.B.detach()})
