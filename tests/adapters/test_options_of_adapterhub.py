"""Options that types have for the sake of AdapterHub's files, each against its equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.adapters.reft import ReFT
from adapterkit.testing import toys
from tests.adapters.test_bottleneck import BLOCKS, built, network, stream
from tests.backends.transformers_models import build
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def gate(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One number for a sample: [batch, 1, 1]."""
    return torch.sigmoid(h @ weight + bias).mean(1)[:, None, None]


def again(model: nn.Module, adapters: ak.Adapters, name: str, path: Path) -> Tensor:
    """What the model gives with the adapter from a file."""
    adapters.save(name, path)
    config = adapters.config(name)
    adapters.detach()
    adapters.load(path, name)
    assert adapters.config(name) == config
    adapters.activate(name)
    return model(X)


def test_the_gate_of_a_bottleneck_over_the_sequence() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(ak.Bottleneck(form="houlsby", gating="sequence"))
    s = block.sublayer(x)
    g = gate(s, module.gate.weight[0], module.gate.bias)
    assert close(module(x, block), s + g * network(module, s))
    with pytest.raises(errors.ConfigError, match="gating must be one of False, True, sequence, not 'token'"):
        ak.Bottleneck(gating="token")


def test_the_gate_of_a_union_over_the_sequence(model: toys.ToyModel, tmp_path: Path) -> None:
    adapters = ak.Adapters(model)
    adapters.add("gated", ak.Union((ak.LoRA(rank=2, targets="attn.q"),), gating="sequence"))
    randomize(adapters, "gated")
    module = adapters.modules("gated")["attn.q@toy.1"]
    own = module.gates["0"]  # type: ignore[union-attr,index]
    x, y = torch.randn(2, 2, 5, toys.WIDTH, dtype=torch.float64).unbind()
    effect = module.members["0"](x, lambda _: y) - y  # type: ignore[union-attr,index,operator]
    assert close(module(x, lambda _: y), y + gate(x, own.weight, own.bias) * effect)  # type: ignore[union-attr,arg-type]
    y = model(X)
    assert torch.equal(again(model, adapters, "gated", tmp_path / "gated.safetensors"), y)
    for wrong in (ak.Prefix(), ak.LoRA(targets="conv")):
        with pytest.raises(errors.IncompatibleTargetError, match="gate over the sequence"):
            adapters.add("wrong", ak.Union((wrong,), gating="sequence"))
    with pytest.raises(errors.ConfigError, match="gating"):
        ak.Union((ak.LoRA(),), gating="tokens")


@pytest.mark.parametrize(("gating", "count"), [("shared", 1), ("separate", 2)])
def test_the_gates_of_a_prefix(model: toys.ToyModel, gating: str, count: int, tmp_path: Path) -> None:
    adapters = ak.Adapters(model)
    adapters.add("gated", ak.Prefix(length=2, gating=gating))
    randomize(adapters, "gated", 4)
    adapters.add("plain", ak.Prefix(length=2))
    adapters.activate("gated")
    for i, block in enumerate(model.blocks):
        module: Any = adapters.modules("gated")[f"attn.kv@toy.{i}"]
        assert len(module.gate.bias) == count
        seen: list[Tensor] = []
        hook = block.attn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))  # type: ignore
        with torch.no_grad():
            y = model(X[:1])  # one row: each prefix is then that of a plain one
        hook.remove()
        g = torch.sigmoid(seen[0] @ module.gate.weight.mT + module.gate.bias).mean(1)[0].detach()
        plain = adapters.modules("plain")[f"attn.kv@toy.{i}"]
        factors = {"keys": g[0], "values": g[-1]}
        plain.load_state_dict({name: factors[name] * t for name, t in module.inner.state_dict().items()})
    adapters.activate("plain")
    assert close(model(X[:1]), y)
    adapters.activate("gated")
    adapters.train("gated")
    y = model(X)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters("gated"))
    adapters.remove("plain")
    assert torch.equal(again(model, adapters, "gated", tmp_path / "gated.safetensors"), y)
    with pytest.raises(errors.ConfigError, match="gating must be None or one of shared, separate, not 'both'"):
        ak.Prefix(gating="both")


def test_what_an_attention_is_given_is_kept_no_longer_than_it_runs(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("gated", ak.Prefix(length=2, gating="shared"))
    model(X)
    taps = adapters._state.switch.local.taps
    assert not taps
    model.blocks[0].attn.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("stopped")))  # type: ignore
    with pytest.raises(ValueError, match="stopped"):
        model(X)
    assert not taps


def test_who_does_not_say_so_is_not_shown_what_an_attention_is_given() -> None:
    from adapterkit.engine.context import Beside, no_side

    with pytest.raises(errors.AttachError, match="reads_input = True"):
        _ = Beside(X, no_side).input


@pytest.mark.parametrize("leave_out", [[], [1]])
def test_prefixes_that_count_move_keys_back(leave_out: list[int]) -> None:
    """T5's bias is that of relative positions, query 0 being the first token: keys then stand `length` further back."""
    model = build("T5").eval().requires_grad_(False)
    x = {"input_ids": torch.arange(1, 7)[None], "decoder_input_ids": torch.arange(4)[None]}
    adapters = ak.Adapters(model)
    targets = " ".join(f"attn.kv@stack=decoder,layer={i}" for i in range(2) if i not in leave_out)
    adapters.add("mine", ak.Prefix(length=3, counted=True, targets=targets, init_std=1.0))
    seen: dict[str, Tensor] = {}
    attention = model.decoder.block[0].layer[0].SelfAttention
    real = attention.compute_bias
    attention.compute_bias = lambda q, k, **options: seen.setdefault(f"{q} {k}", real(q, k, **options))
    logits = model(**x).logits
    assert set(seen) == {"4 4", "4 7"}  # the model's own, and the one that counts the prefix
    assert torch.equal(seen["4 7"][..., 0, 3], seen["4 4"][..., 0, 3])  # its first token: three away from itself
    adapters.add("other", ak.Prefix(length=3, targets=targets))
    for key, module in adapters.modules("other").items():
        module.load_state_dict(adapters.modules("mine")[key].state_dict())
    adapters.activate("other")
    assert not torch.allclose(model(**x).logits, logits, atol=1e-3)


def test_prefixes_that_count_need_the_table_of_positions() -> None:
    model = build("T5").eval().requires_grad_(False)
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.Prefix(length=3, counted=True, targets="attn.kv@stack=decoder,layer=1"))
    with pytest.raises(errors.IncompatibleTargetError, match="at the first layer of the stack"):
        model(input_ids=X[:1] % 9, decoder_input_ids=X[:1] % 9)


def test_compacter_with_rules_of_its_own(model: toys.ToyModel, tmp_path: Path) -> None:
    adapters = ak.Adapters(model)
    base = model(X)
    adapters.add("mine", ak.Compacter(n=2, shared_rule=False))
    assert torch.equal(model(X), base)
    randomize(adapters, "mine")
    modules: list[Any] = list(adapters.modules("mine").values())
    assert len({id(layer.rule) for module in modules for layer in (module.down, module.up)}) == 2 * len(modules)
    x = torch.randn(3, toys.WIDTH, dtype=torch.float64)
    layer = modules[0].down
    weight = sum(torch.kron(layer.rule[i], layer.left[i] @ layer.right[i]) for i in range(2))
    assert close(modules[0].reduce(x), x @ weight + layer.bias)
    y = model(X)
    assert torch.equal(again(model, adapters, "mine", tmp_path / "mine.safetensors"), y)


def test_an_activation_on_what_reft_learns() -> None:
    torch.manual_seed(0)
    edit = ReFT(form="noreft", rank=3, activation="relu").build(toys_point()).double().first
    h = torch.randn(2, 5, 12, dtype=torch.float64)
    edit.projection.data.normal_()
    expected = ((h @ edit.source.mT + edit.bias).relu() - h @ edit.projection.mT) @ edit.projection
    assert close(edit(h), expected)
    neutral = [config.neutral for config in (ReFT(), ReFT(activation="relu"), ReFT(form="direft", activation="relu"))]
    assert neutral == [True, False, True]
    with pytest.raises(errors.ConfigError, match="activation must be one of"):
        ReFT(activation="rely")


def toys_point() -> ak.InjectionPoint:
    from adapterkit.points import OutputLayout, OutputPoint

    return OutputPoint("hidden", "block", "0", 12, 12, OutputLayout("block", whole=True))


@pytest.mark.parametrize("plain_norm", [True, False])
def test_dora_as_another_tool_has_it(model: toys.ToyModel, plain_norm: bool) -> None:
    adapters = ak.Adapters(model)
    base = model(X)
    adapters.add("d", ak.DoRA(rank=3, alpha=5, targets="mlp.up conv", scale_bias=True, plain_norm=plain_norm))
    assert torch.allclose(model(X), base, atol=1e-9)
    randomize(adapters, "d")
    y = model(X)
    with adapters.merged():
        assert close(model(X), y)
    layer: Any = model.blocks[0].up  # type: ignore[union-attr]
    module = adapters.modules("d")["mlp.up@toy.0"]
    product = module.B @ module.A  # type: ignore[operator]
    n = (layer.weight + (1 if plain_norm else 5 / 3) * product).norm(dim=1)
    merged, bias = module.merged(layer.weight, layer.bias)
    ratio = module.magnitude / n  # type: ignore[operator]
    assert close(merged, ratio[:, None] * (layer.weight + 5 / 3 * product))
    assert close(bias, ratio * layer.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("query", ["sum", "output", "part"])
def test_what_the_query_of_a_fusion_is_made_from(model: toys.ToyModel, query: str) -> None:
    adapters = ak.Adapters(model)
    for name, form in (("a", "pfeiffer"), ("b", "parallel_norm")):
        adapters.add(name, ak.Bottleneck(width=3, form=form))
        randomize(adapters, name)
    adapters.add("f", ak.Fuse(parts=("a", "b"), query=query))
    randomize(adapters, "f", 2)
    module: Any = adapters.modules("f")["mlp@toy.0"]
    block: Any = model.blocks[0]
    x = torch.randn(2, 4, toys.WIDTH, dtype=torch.float64)

    class Base:
        def __call__(self, given: Tensor) -> Tensor:
            return block.mlp(block.norm2(given))

        def norm_in(self, given: Tensor) -> Tensor:
            return block.norm2(given)

        def norm_out(self, given: Tensor) -> Tensor:
            return 2 * given

    base = Base()
    parts = [adapters.modules(name)["mlp@toy.0"] for name in "ab"]
    s = base(x)
    h = {"sum": 2 * (x + s), "output": s, "part": block.norm2(x)}[query]
    u = torch.stack([part(x, base) - s for part in parts], dim=-2)
    assert close(module.combine(x, base, parts), s + module.fused(h, u))
    with pytest.raises(errors.ConfigError, match="query must be one of"):
        ak.Fuse(parts=("a",), query="key")


def test_a_type_sees_the_sum_where_it_says_nothing(model: toys.ToyModel) -> None:
    """A fusion of an adapter that is a fusion, and of one that acts elsewhere."""
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3))
    adapters.add("inner", ak.Fuse(parts=("a",)))
    adapters.add("outer", ak.Fuse(parts=("a", "inner"), query="part"))
    adapters.add("as_sum", ak.Fuse(parts=("a", "inner"), query="sum"))
    for name in ("a", "inner", "outer", "as_sum"):
        randomize(adapters, name, 3)
    found = []
    for name in ("outer", "as_sum"):
        adapters.activate(name)
        found.append(model(X))
    assert torch.equal(*found)
