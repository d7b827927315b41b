"""Every built-in type runs the kit, in each of its ways of computing."""

from __future__ import annotations

import adapterkit as ak
from adapterkit.testing import AdapterConformance
from adapterkit.testing.subject import randomise


class TestLoRA(AdapterConformance):
    config = ak.LoRA(rank=2, alpha=3)


class TestPiSSA(AdapterConformance):
    config = ak.LoRA(rank=2, alpha=3, init="pissa", scaling="rank_stabilized")


class TestDoRA(AdapterConformance):
    config = ak.DoRA(rank=2, alpha=3)


class TestAdaLoRA(AdapterConformance):
    config = ak.AdaLoRA(rank=2, alpha=3)


class TestPrefix(AdapterConformance):
    config = ak.Prefix(length=2)


class TestReparametrizedPrefix(AdapterConformance):
    config = ak.Prefix(length=2, reparam=3)


class TestBottleneck(AdapterConformance):
    config = ak.Bottleneck(width=3, activation="gelu", scaling="learned")


class TestParallelBottleneck(AdapterConformance):
    config = ak.Bottleneck(width=3, activation="silu", form="parallel_norm")


class TestUnion(AdapterConformance):
    config = ak.Union((ak.LoRA(rank=2, targets="attn.q"), ak.Prefix(length=2), ak.Bottleneck(width=2, targets="mlp")))


class TestGatedUnion(AdapterConformance):
    config = ak.Union((ak.LoRA(rank=2), ak.LoRA(rank=1, targets="attn.q")), gating=True)


class TestFuse(AdapterConformance):
    config = ak.Fuse(parts=("one", "two"))

    def prepare(self, adapters: ak.Adapters, config: ak.AdapterConfig) -> None:
        for name, activation in (("one", "gelu"), ("two", "tanh")):
            adapters.add(name, ak.Bottleneck(width=3, activation=activation, targets=config.targets))
            randomise(adapters, name)
