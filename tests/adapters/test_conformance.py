"""Every built-in type runs the kit, in each of its ways of computing: the further ones of a type with the slow tests.

Their equations are tested beside this file, one by one.
"""

from __future__ import annotations

import pytest

import adapterkit as ak
from adapterkit.testing import AdapterConformance
from adapterkit.testing.subject import randomise


class TestLoRA(AdapterConformance):
    config = ak.LoRA(rank=2, alpha=3)


@pytest.mark.slow
class TestPiSSA(AdapterConformance):
    config = ak.LoRA(rank=2, alpha=3, init="pissa", scaling="rank_stabilized")


class TestDoRA(AdapterConformance):
    config = ak.DoRA(rank=2, alpha=3)


class TestAdaLoRA(AdapterConformance):
    config = ak.AdaLoRA(rank=2, alpha=3)


class TestPrefix(AdapterConformance):
    config = ak.Prefix(length=2)


@pytest.mark.slow
class TestReparametrizedPrefix(AdapterConformance):
    config = ak.Prefix(length=2, reparam=3)


class TestBottleneck(AdapterConformance):
    config = ak.Bottleneck(width=3, activation="gelu", scaling="learned")


@pytest.mark.slow
class TestParallelBottleneck(AdapterConformance):
    config = ak.Bottleneck(width=3, activation="silu", form="parallel_norm")


@pytest.mark.slow
class TestAdapterPlus(AdapterConformance):
    config = ak.Bottleneck.adapter_plus(width=3, norm_before=True)


class TestGatedBottleneck(AdapterConformance):
    config = ak.Bottleneck(width=3, activation="gelu", gating=True, norm_after="network", residual="sum")


class TestCompacter(AdapterConformance):
    config = ak.Compacter(n=2, width=4)


class TestInvertible(AdapterConformance):
    config = ak.Invertible(coupling="affine", activation="gelu")


class TestLoReFT(AdapterConformance):
    config = ak.ReFT(rank=2, prefix=2, suffix=1, tied=False)


@pytest.mark.slow
class TestDiReFT(AdapterConformance):
    config = ak.ReFT(rank=2, form="direft")


class TestPrompt(AdapterConformance):
    config = ak.Prompt(length=2)


class TestTrainable(AdapterConformance):
    config = ak.Trainable("attn.* mlp.* norm")


@pytest.mark.slow
class TestBiases(AdapterConformance):
    config = ak.Trainable("attn.* mlp.* norm", part="bias")


class TestRows(AdapterConformance):
    config = ak.Trainable("embed.tokens", rows=(3, 5))


class TestNewHead(AdapterConformance):
    config = ak.Trainable("head", outputs=4)


class TestUnion(AdapterConformance):
    config = ak.Union((ak.LoRA(rank=2, targets="attn.q"), ak.Prefix(length=2), ak.Bottleneck(width=2, targets="mlp")))


@pytest.mark.slow
class TestUnionOfShared(AdapterConformance):
    config = ak.Union((ak.Compacter(n=2, width=4, targets="mlp"), ak.Invertible()))


@pytest.mark.slow
class TestGatedUnion(AdapterConformance):
    config = ak.Union((ak.LoRA(rank=2), ak.LoRA(rank=1, targets="attn.q")), gating=True)


class TestTied(AdapterConformance):
    config = ak.Tied(ak.LoRA(rank=2))


class TestFuse(AdapterConformance):
    config = ak.Fuse(parts=("one", "two"))

    def prepare(self, adapters: ak.Adapters, config: ak.AdapterConfig) -> None:
        for name, activation in (("one", "gelu"), ("two", "tanh")):
            adapters.add(name, ak.Bottleneck(width=3, form="houlsby", activation=activation, targets=config.targets))
            randomise(adapters, name)
