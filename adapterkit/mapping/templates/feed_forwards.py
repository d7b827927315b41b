"""Feed-forwards by the children that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapterkit.mapping.entries import Fused, Weight
from adapterkit.mapping.templates.template import Template


def gated(gate: str, up: str, down: str) -> Template:
    """down(activation(gate(x)) * up(x))."""
    return Template(f"{gate} {up} {down}", (Weight("*.gate", gate), Weight("*.up", up), Weight("*.down", down)))


def plain(up: str, down: str) -> Template:
    """down(activation(up(x)))."""
    return Template(f"{up} {down}", (Weight("*.up", up), Weight("*.down", down)))


def packed(first: str, down: str, order: str, when: Callable[[Any], bool] | None = None) -> Template:
    """As `gated`, where `first` makes gate and up in this order."""
    return Template(f"{first} {down}", (Fused(tuple(order.split()), first), Weight("*.down", down)), when=when)


FEED_FORWARDS: tuple[Template, ...] = (
    gated("gate_proj", "up_proj", "down_proj"),
    gated("w1", "w3", "w2"),
    plain("fc1", "fc2"),
    plain("up_proj", "down_proj"),
    plain("intermediate.dense", "output.dense"),
    plain("dense_h_to_4h", "dense_4h_to_h"),
    plain("c_fc", "c_proj"),
    plain("linear_fc1", "linear_fc2"),
    plain("lin1", "lin2"),
    gated("wi_0", "wi_1", "wo"),
    plain("wi", "wo"),
    plain("linear_1", "linear_2"),
    plain("layer_1", "layer_2"),
    Template("receptance key value", (Weight("*.up", "key"), Weight("*.down", "value")), without="query output"),
    plain("fc_in", "fc_out"),
    plain("net.0.proj", "net.2"),
)
"""The first that matches is a module's."""
