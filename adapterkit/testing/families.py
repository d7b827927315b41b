"""The backends of the tiny models: tables like any third party's."""

from __future__ import annotations

import sys
from typing import ClassVar

from torch import nn

import adapterkit as ak
from adapterkit.backend import Backend, Reach
from adapterkit.backends.longer import longer_blocks
from adapterkit.mapping.everywhere import prompt_layer_points
from adapterkit.mapping.family import (
    Attention,
    Experts,
    Fused,
    Group,
    Output,
    Tokens,
    Weight,
    equal_parts,
    resolve,
)
from adapterkit.points import AttentionPoint, InjectionPoint
from adapterkit.specs import BackendSpec
from adapterkit.testing import toys


class _Table(Backend):
    whole_blocks = True
    groups: ClassVar[tuple[Group, ...]]

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, self.groups, component)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(seam=toys.ToySeam()) if isinstance(point, AttentionPoint) else Reach()


class ToyVisionBackend(_Table):
    """Maps `ToyVision`."""

    component = "vision"
    groups = (
        Group("", "", (Weight("embed.patch", "patch"), Weight("head", "head"))),
        Group(
            "blocks.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.qkv"),
                Weight("attn.o", "attn.proj"),
                Weight("mlp.up", "mlp.0"),
                Weight("mlp.down", "mlp.2"),
                Output("attn", "attn", "attn", norm_out="norm1", width="attn.qkv"),
                Output("mlp", "mlp", "mlp", norm_out="norm2", width="mlp.0"),
                Attention("attn.kv", "attn", toys.heads_of),
            ),
        ),
    )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`: every block can run on more positions."""
        found = super().points(model, component)
        return [*found, *prompt_layer_points(model, found)]

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(lengthening=longer_blocks) if point.role == "prompt.layer" else super().reach(model, point)


class ToyDiffusionBackend(_Table):
    """Maps `ToyDiffusion`."""

    component = "unet"
    groups = (
        Group(
            "",
            "",
            (Weight("proj.in", "conv_in"), Weight("proj.out", "conv_out"), Weight("embed.time", "time")),
        ),
        *(
            Group(
                stage,
                stage,
                (Weight("res.conv1", "conv1"), Weight("res.conv2", "conv2"), Weight("res.time", "time")),
                {"stage": stage},
            )
            for stage in ("down", "up")
        ),
        Group(
            "",
            "mid",
            (
                Weight("cross.q", "cross.q"),
                Weight("cross.k", "cross.k"),
                Weight("cross.v", "cross.v"),
                Weight("cross.o", "cross.out"),
                Output("cross", "cross", "norm", norm_in="norm"),
            ),
            {"stage": "mid"},
        ),
    )


class ToyMixtureBackend(_Table):
    """Maps `ToyMixture`."""

    component = "language"
    groups = (
        Group(
            "",
            "",
            (
                Weight("embed.tokens", "embed"),
                Tokens("tokens", "embed"),
                Weight("mlp.up", "twice"),
                Weight("moe.router", "experts.router"),
                Experts(("moe.gate", "moe.up"), "experts", "gate_up", split=lambda module, rows: equal_parts(2, rows)),
                Experts(("moe.down",), "experts", "down"),
                Output("mlp", "experts", "norm", norm_in="norm"),
                Weight("head", "head"),
            ),
        ),
    )


@ak.hookimpl
def adapterkit_register_backends() -> list[BackendSpec]:
    """Adds the tiny models' families."""
    return [
        BackendSpec(f"toy_{name}", f"{__name__}:{cls}Backend", models=(f"adapterkit:{cls}",), summary="a tiny model")
        for name, cls in (("vision", "ToyVision"), ("diffusion", "ToyDiffusion"), ("mixture", "ToyMixture"))
    ]


def register() -> None:
    """Makes the tiny models known to this process, once. Nothing but them is mapped by it."""
    toys.register()
    manager = ak.get_plugin_manager()
    if "toy_vision" not in manager.backends():
        manager.register(sys.modules[__name__], name="toy_families")
