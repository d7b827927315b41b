"""Random programs of handle calls against plain matrix formulas in float64, for every built-in type."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import NotMergeableError, StateError
from adapterkit.testing import toys

Tensors = dict[str, Tensor]
NAMES = ["a", "b", "c"]
WEIGHTS = [0.0, 0.25, 1.0, 2.0]


class Oracle:
    """A one-block ToyModel as formulas. Adapters are plain tensors here; only the type's published equation is used."""

    def __init__(self, model: toys.ToyModel) -> None:
        self.w = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def __call__(self, ids: Tensor, active: list[tuple[Tensors, float]]) -> Tensor:
        w, block = self.w, "blocks.0."
        x = F.embedding(ids, w["embed.weight"])
        normed = self.norm(x, block + "norm1")
        s = self.attention(normed, active)
        x = x + s + self.bottleneck("attn", x, s, active)
        up = self.linear(self.norm(x, block + "norm2"), block + "up", "mlp.up", active)
        s = self.linear(F.gelu(up), block + "down", "mlp.down", active)
        x = x + s + self.bottleneck("mlp", x, s, active)
        x = (
            x
            + F.conv1d(
                x.mT, self.weight(block + "conv", "conv", active), w[block + "conv.bias"], padding=1, groups=2
            ).mT
        )
        return self.norm(x, "norm") @ w["head.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"])

    def weight(self, name: str, role: str, active: list[tuple[Tensors, float]]) -> Tensor:
        total = self.w[name + ".weight"]
        for tensors, scale in active:
            if f"{role}/A" in tensors:
                a, b = tensors[f"{role}/A"], tensors[f"{role}/B"]
                total = total + scale * (b @ a.flatten(1)).view_as(total)
        return total

    def linear(self, x: Tensor, name: str, role: str, active: list[tuple[Tensors, float]]) -> Tensor:
        return F.linear(x, self.weight(name, role, active), self.w.get(name + ".bias"))

    def attention(self, x: Tensor, active: list[tuple[Tensors, float]]) -> Tensor:
        fused, bias = self.w["blocks.0.attn.qkv.weight"], self.w["blocks.0.attn.qkv.bias"]
        parts = []
        for role, weight, offset in zip("qkv", fused.chunk(3), bias.chunk(3), strict=True):
            for tensors, scale in active:
                if f"attn.{role}/A" in tensors:
                    weight = weight + scale * tensors[f"attn.{role}/B"] @ tensors[f"attn.{role}/A"]
            parts.append(x @ weight.T + offset)
        q, k, v = (part.unflatten(-1, (toys.HEADS, -1)).transpose(1, 2) for part in parts)
        n = x.shape[1]
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        for tensors, scale in active:
            if "attn.kv/keys" in tensors and scale > 0:
                front = q @ tensors["attn.kv/keys"].mT / math.sqrt(q.shape[-1]) + math.log(scale)
                logits = torch.cat([front, logits], dim=-1)
                v = torch.cat([tensors["attn.kv/values"].expand(len(x), -1, -1, -1), v], dim=2)
        y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.linear(y, "blocks.0.attn.proj", "attn.o", active)

    def bottleneck(self, role: str, x: Tensor, s: Tensor, active: list[tuple[Tensors, float]]) -> Tensor:
        total = torch.zeros_like(s)
        for tensors, scale in active:
            if f"{role}/down.weight" in tensors:
                inner = F.gelu((s + x) @ tensors[f"{role}/down.weight"].T + tensors[f"{role}/down.bias"])
                total = total + scale * (inner @ tensors[f"{role}/up.weight"].T + tensors[f"{role}/up.bias"])
        return total


class Machine(RuleBasedStateMachine):
    """Subclasses set `config` and `prepare`, which turns a state dict into the oracle's tensors."""

    config: ak.AdapterConfig

    def __init__(self) -> None:
        super().__init__()
        toys.register()
        self.model = toys.ToyModel(layers=1).double().eval()
        self.oracle, self.x = Oracle(self.model), toys.ids()
        self.base = self.model(self.x)
        self.adapters = ak.Adapters(self.model)
        self.tensors: dict[str, Tensors] = {}
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.files: dict[str, Tensors] = {}

    def teardown(self) -> None:
        self.adapters.detach()
        assert torch.equal(self.model(self.x), self.base)
        assert not any("adapterkit" in key for key in self.model.state_dict())
        self.folder.cleanup()

    def told(self, name: str) -> Tensors:
        """The parameters as the oracle wants them: by role."""
        return {key.replace("@toy.0", ""): t.detach().clone() for key, t in self.adapters.state_dict(name).items()}

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 5))
    def add(self, name: str, seed: int) -> None:
        if name in self.adapters or self.merged is not None:
            return
        self.adapters.add(name, self.config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.adapters.parameters(name):
                parameter.normal_(0, 0.4, generator=generator)
        self.tensors[name], self.active = self.told(name), {name: 1.0}

    @rule(weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(WEIGHTS)))
    def activate(self, weights: dict[str, float]) -> None:
        weights = {name: weight for name, weight in weights.items() if name in self.adapters}
        if self.merged is not None:
            with pytest.raises(StateError):
                self.adapters.activate(weights)
            return
        self.adapters.activate(weights)
        self.active = weights

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name not in self.adapters or (self.merged is not None and name in self.merged):
            return
        self.adapters.remove(name)
        del self.tensors[name]
        self.active.pop(name, None)

    @precondition(lambda self: self.merged is None and self.active)
    @rule()
    def merge(self) -> None:
        try:
            self.adapters.merge()
        except NotMergeableError:
            assert any(point.kind != "weight" for point in self.adapters.points() if point.kind in self.config.kinds)
        else:
            self.merged = dict(self.active)

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self) -> None:
        self.adapters.unmerge()
        self.merged = None

    @precondition(lambda self: self.merged is None)
    @rule()
    def disable(self) -> None:
        with self.adapters.disabled():
            assert torch.equal(self.model(self.x), self.base)

    @precondition(lambda self: self.merged is None)
    @rule(name=st.sampled_from(NAMES), weight=st.sampled_from(WEIGHTS))
    def borrow(self, name: str, weight: float) -> None:
        if name in self.adapters:
            with self.adapters.activated({name: weight}):
                self.check({name: weight})

    @rule(name=st.sampled_from(NAMES))
    def save(self, name: str) -> None:
        if name in self.adapters:
            self.adapters.save(name, self.path(name))
            self.files[name] = self.tensors[name]

    @rule(source=st.sampled_from(NAMES), name=st.sampled_from(NAMES))
    def load(self, source: str, name: str) -> None:
        if source not in self.files or name in self.adapters:
            return
        self.adapters.load(self.path(source), name=name)
        self.tensors[name] = self.told(name)
        assert self.tensors[name].keys() == self.files[source].keys()
        assert all(torch.equal(t, self.files[source][key]) for key, t in self.tensors[name].items())

    @rule()
    def detach(self) -> None:
        self.adapters.detach()
        self.tensors, self.active, self.merged = {}, {}, None
        assert torch.equal(self.model(self.x), self.base)

    @invariant()
    def equals_the_oracle(self) -> None:
        self.check(self.active)

    def check(self, active: dict[str, float]) -> None:
        expected = self.oracle(self.x, [(self.tensors[name], weight) for name, weight in active.items()])
        assert torch.allclose(self.model(self.x), expected, rtol=1e-9, atol=1e-9)

    def path(self, name: str) -> Path:
        return Path(self.folder.name) / f"{name}.safetensors"


CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="attn.{q,v,o} mlp.* conv"),
    "bottleneck": ak.Bottleneck(targets="attn mlp", form="pfeiffer", activation="gelu", reduction=4),
    "prefix": ak.Prefix(length=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("examples", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_random_programs(name: str, examples: int) -> None:
    machine: Any = type("Machine", (Machine,), {"config": CONFIGS[name]})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        ),
    )
