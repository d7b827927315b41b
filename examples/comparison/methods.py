"""The methods that are compared, and the learning rates at which each is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
"""Half decades: neighbours differ by a factor of about 3."""


@dataclass(frozen=True)
class Places:
    """Where methods act in a model, as selectors.

    Attributes:
        weights: Projections and convolutions that get a low-rank update.
        sublayers: Outputs that a bottleneck follows.
        attention: Attentions that a prefix extends.
        within: What is added to every selector, such as `@component=unet`.
    """

    weights: str = "linear"
    sublayers: str = "attn mlp"
    attention: str = "attn.kv"
    within: str = ""

    def at(self, selector: str) -> str:
        """The selector, within."""
        return " ".join(f"{word}{self.within}" for word in selector.split())


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        adapter: The section `adapter` of a run, for a model with these places.
        rate: The middle of the rates that are tried: what is customary for small models.
    """

    adapter: Callable[[Places], Mapping[str, Any]]
    rate: float


HEAD = "head only"
METHODS: dict[str, Method] = {
    HEAD: Method(lambda places: {"type": "trainable", "targets": "head"}, 1e-1),
    "LoRA": Method(lambda places: {"type": "lora", "rank": 8, "targets": places.at(places.weights)}, 1e-2),
    "DoRA": Method(lambda places: {"type": "dora", "rank": 8, "targets": places.at(places.weights)}, 1e-2),
    "bottleneck": Method(lambda p: {"type": "bottleneck", "width": 16, "targets": p.at(p.sublayers)}, 1e-2),
    "prefix": Method(lambda places: {"type": "prefix", "length": 16, "targets": places.at(places.attention)}, 1e-1),
    "ReFT": Method(lambda places: {"type": "reft", "rank": 8, "targets": places.at("hidden")}, 1e-2),
    "full": Method(lambda places: {"type": "trainable", "targets": places.at("*")}, 1e-3),
}
"""By name; `head only` where a task has a new head, which then trains beside every other method too."""


def first_rates(method: str, scale: float) -> list[float]:
    """Three rates around a method's middle.

    Args:
        method: Its name.
        scale: What the middle is multiplied by for a model.
    """
    middle = RATES.index(float(f"{METHODS[method].rate * scale:.0e}"))
    return [*RATES[middle - 1 : middle + 2]]


def next_rate(found: Mapping[float, float]) -> float | None:
    """The rate beyond the best one, where that is the lowest or highest of those tried, which are at most 5; else None.

    Args:
        found: Rate -> loss or the like, of which less is better.
    """
    best, tried = min(found, key=lambda rate: found[rate]), sorted(found)
    if len(tried) >= 5 or best not in (tried[0], tried[-1]):
        return None
    place = RATES.index(best) + (1 if best == tried[-1] else -1)
    return RATES[place] if 0 <= place < len(RATES) else None
