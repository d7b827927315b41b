"""Weights that are computed: one for each row of the batch, or for each row and token, with their gradients."""

from __future__ import annotations

from torch import Tensor

from adapterkit.contract.layouts import Repeats
from adapterkit.errors import RoutingError
from adapterkit.kernels.batches import repeated


class Gates:
    """How strongly an adapter acts for each row, [rows], or for each row and token, [rows, tokens].

    Args:
        values: The weights.
        repeats: How a module's batch gets larger; see `adapterkit.backend.Backend.repeats`.
    """

    def __init__(self, values: Tensor, repeats: Repeats | None = None) -> None:
        self.values = values
        self.repeats: Repeats | None = repeats

    def at(self, repeats: Repeats | None) -> Gates:
        """The same at a point whose batch is repeated so."""
        return Gates(self.values, repeats)

    def scaled(self, effect: Tensor) -> Tensor:
        """An adapter's effect [rows, ...] (or [rows, tokens, features]) times its weights.

        Raises:
            RoutingError: It has other rows or tokens.
        """
        values, axes = repeated(self.values, effect, self.repeats), self.values.ndim
        features = effect.ndim - axes
        if effect.shape[:axes] != values.shape or not features or (axes > 1 and features != 1):
            each = "row" if axes == 1 else "row and token"
            raise RoutingError(
                f"weights {tuple(values.shape)} were given, one for each {each}, but an adapter's effect is "
                f"{tuple(effect.shape)} at a point; leave out the points where rows or tokens are others (windows, "
                "experts, position embeddings)"
            )
        return values.to(effect.device, effect.dtype).view(*values.shape, *(1 for _ in range(features))) * effect
