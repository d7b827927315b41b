"""A gate over experts: how strongly each acts, for each layer and token, from the hidden states of a first pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from adapterkit import Adapters, InjectionPoint
from adapterkit.errors import ConfigError


class Gate(nn.Module):
    """`softmax(MLP(h) / temperature)` over the experts, for each layer (Buehler and Buehler 2024, arXiv:2402.07148).

    Args:
        experts: Names of adapters.
        layers: Numbers of the layers in which they act.
        features: Of a hidden state.
        width: Of the one hidden layer; None for a single linear layer.
        temperature: Above 1 for more equal weights.
    """

    def __init__(
        self,
        experts: Sequence[str],
        layers: Sequence[int],
        features: int,
        *,
        width: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts, self.layers, self.temperature = list(experts), list(layers), temperature
        out = len(self.experts) * len(self.layers)
        inner = [nn.Linear(features, width), nn.ReLU()] if width else []
        self.mlp = nn.Sequential(*inner, nn.Linear(width or features, out))

    @classmethod
    def between(
        cls, adapters: Adapters, experts: Sequence[str], features: int, *, width: int | None = None, **options: float
    ) -> Gate:
        """A gate over adapters that are on a model, for the layers in which they act.

        Raises:
            UnknownNameError: There is no such adapter.
            ConfigError: One acts outside of numbered layers.
        """
        points = {point.id: point for point in adapters.points()}
        used = [points[key] for name in experts for key in adapters.modules(name)]
        layers = sorted({layer_of(point) for point in used})
        return cls(experts, layers, features, width=width, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        """Weights [rows, tokens, layers, experts], from hidden states [rows, tokens, features]."""
        logits = self.mlp(hidden).unflatten(-1, (len(self.layers), len(self.experts)))
        return torch.softmax(logits / self.temperature, dim=-1)


@contextlib.contextmanager
def gated(adapters: Adapters, gate: Gate, first: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Inside the block the experts act with the weights that the gate gives for this input.

    Args:
        adapters: The model's.
        gate: Over some of them.
        first: Runs the model on the input, and gives hidden states [rows, tokens, features]. No adapter acts in it.
    """
    with adapters.disabled(), torch.no_grad():
        hidden = first()
    weights = gate(hidden)
    places = {layer: i for i, layer in enumerate(gate.layers)}

    def at(expert: int) -> Callable[[InjectionPoint, int], Tensor]:
        return lambda point, step: weights[:, :, places[layer_of(point)], expert]

    with adapters.activated({name: at(i) for i, name in enumerate(gate.experts)}):
        yield weights


def layer_of(point: InjectionPoint) -> int:
    """The number of the layer in which a point lies.

    Raises:
        ConfigError: It lies in none.
    """
    layer = point.tags.get("layer")
    if not isinstance(layer, int):
        raise ConfigError([f"{point.id} lies in no numbered layer, and a gate has weights for those"], "Gate")
    return layer
