"""Stack, Parallel, Average, Split, block weights, functions of the step; Fuse and Union: each as its equation."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.engine.expressions import Spread
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()
CONFIGS: dict[str, ak.AdapterConfig] = {
    "a": ak.LoRA(rank=2, targets="all"),
    "b": ak.LoRA(rank=3, targets="attn.q mlp.*"),
    "neck": ak.Bottleneck(targets="attn mlp", activation="gelu", reduction=2),
    "other": ak.Bottleneck(targets="mlp", activation="tanh", reduction=2),
    "kv": ak.Prefix(length=2),
    "long": ak.Prefix(length=3),
}


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    return adapted(model)


def adapted(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for i, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def run(model: nn.Module, adapters: ak.Adapters, choice: object) -> Tensor:
    with adapters.activated(choice):  # type: ignore[arg-type]
        return model(X)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_average_of_one_adapter_with_itself_is_the_adapter(
    model: toys.ToyModel, adapters: ak.Adapters, name: str
) -> None:
    alone = run(model, adapters, name)
    assert not close(alone, run(model, adapters, None))
    assert close(run(model, adapters, ak.Average(name, name)), alone)
    assert torch.equal(run(model, adapters, ak.Stack(name)), alone)
    assert close(run(model, adapters, ak.Average(name)), alone)


def test_parallel_is_the_sum_and_average_its_mean(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    names = ("a", "b", "neck", "kv")
    assert close(run(model, adapters, ak.Parallel(*names)), run(model, adapters, list(names)))
    quarter = dict.fromkeys(names, 0.25)
    assert close(run(model, adapters, ak.Average(*names)), run(model, adapters, quarter))
    assert close(run(model, adapters, {ak.Average("a", "b"): 2.0}), run(model, adapters, ["a", "b"]))


class Sublayers:
    """What the toy computes, written out, with bottlenecks at its feed-forwards' outputs."""

    def __init__(self, model: toys.ToyModel, adapters: ak.Adapters) -> None:
        self.model, self.adapters = model, adapters

    def expected(self, order: tuple[str, ...]) -> Tensor:
        model = self.model
        blocks: Any = model.blocks
        with self.adapters.disabled():
            h = model.embed(X)
            for i, block in enumerate(blocks):
                h = h + block.attn(block.norm1(h))[0]
                s = block.mlp(block.norm2(h))
                for name in order:
                    s = self.at(i, name, s, h)
                h = h + s
                h = h + block.conv(h.mT).mT
            return model.head(model.norm(h))

    def at(self, layer: int, name: str, s: Tensor, x: Tensor) -> Tensor:
        module = self.adapters.modules(name)[f"mlp@toy.{layer}"]
        f = torch.tanh if name == "other" else nn.functional.gelu
        h = f((s + x) @ module.down.weight.mT + module.down.bias)  # type: ignore[union-attr,operator]
        return s + h @ module.up.weight.mT + module.up.bias  # type: ignore[union-attr,operator]


@pytest.fixture
def necks(model: toys.ToyModel) -> ak.Adapters:
    """Two bottlenecks at the same points."""
    adapters = ak.Adapters(model)
    for i, (name, activation) in enumerate((("neck", "gelu"), ("other", "tanh"))):
        adapters.add(name, ak.Bottleneck(targets="mlp", activation=activation, reduction=2))
        randomize(adapters, name, i)
    return adapters


@pytest.mark.parametrize("order", [("neck", "other"), ("other", "neck")])
def test_a_stack_nests_bottlenecks(model: toys.ToyModel, necks: ak.Adapters, order: tuple[str, str]) -> None:
    assert close(run(model, necks, ak.Stack(*order)), Sublayers(model, necks).expected(order))
    assert not close(run(model, necks, ak.Stack(*order)), run(model, necks, list(order)))


def test_a_stack_of_additive_adapters_is_their_sum_and_merges(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    stacked = run(model, adapters, ak.Stack("a", "b"))
    assert close(stacked, run(model, adapters, ["a", "b"]))
    for choice in (ak.Stack("a", "b"), ak.Average("a", "b", "a"), {ak.Parallel("a", "b"): -0.5, "b": 2}):
        unmerged = run(model, adapters, choice)
        with adapters.merged(choice):  # type: ignore[arg-type]
            assert close(model(X), unmerged)


def test_expressions_nest(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    nested = run(model, adapters, ak.Stack("a", ak.Average("neck", ak.Parallel("b", "kv"))))
    half = run(model, adapters, {"a": 1.0, ak.Average("b"): 0.5, "kv": 0.5, "neck": 0.5})
    assert nested.shape == half.shape
    assert close(run(model, adapters, ak.Average("kv", "long")), run(model, adapters, {"kv": 0.5, "long": 0.5}))
    assert close(run(model, adapters, ak.Stack("kv", "long")), run(model, adapters, ["kv", "long"]))


@pytest.fixture
def positionwise(model: toys.ToyModel) -> ak.Adapters:
    """Adapters at one layer whose effect on a token depends on that token alone."""
    adapters = ak.Adapters(model)
    for i, name in enumerate(("a", "neck")):
        config = ak.LoRA(rank=2, targets="mlp.up@layer=1") if name == "a" else ak.Bottleneck(targets="mlp@layer=1")
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


def test_split_gives_every_span_its_own(model: toys.ToyModel, positionwise: ak.Adapters) -> None:
    model.blocks[1].conv.weight.data.zero_()  # the toy's convolution mixes neighbours  # type: ignore[union-attr]
    split = run(model, positionwise, ak.Split({"a": (0, 2), "neck": (-2, None)}))
    for span, choice in ((slice(0, 2), "a"), (slice(2, 3), None), (slice(3, 5), "neck")):
        assert close(split[:, span], run(model, positionwise, choice)[:, span])


def test_a_span_without_a_token_overlaps_nothing(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("c", ak.LoRA(rank=1, targets="mlp.up"))
    randomize(adapters, "c")
    alone = run(model, adapters, ak.Split({"b": (0, 4)}))
    assert close(run(model, adapters, ak.Split({"b": (0, 4), "c": (2, -3)})), alone)
    with pytest.raises(errors.RoutingError, match="overlap in a sequence of 5 tokens"):
        run(model, adapters, ak.Split({"b": (0, 4), "c": (2, -2)}))


def test_split_refuses_what_has_no_tokens(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("conv", ak.LoRA(rank=1, targets="conv"))
    for name in ("kv", "conv"):
        with pytest.raises(errors.RoutingError, match=f"Split cannot give '{name}'"):
            adapters.activate(ak.Stack("b", ak.Split({name: (0, 2)})))
    adapters.activate("b")
    with pytest.raises(errors.NotMergeableError, match="token span"):
        adapters.merge(ak.Split({"b": (0, 2)}))


def test_split_tells_an_output_without_tokens() -> None:
    told = r"an output \(2, 3\) has no axis of tokens: expected \[batch, length, features\]"
    with pytest.raises(errors.RoutingError, match=told):
        Spread([])(torch.randn(2, 4), lambda x: x[:, :3])  # type: ignore[arg-type]


def test_block_weights(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    weights = {"a": {"*@layer=0": 0.3, "*": 0.8}, "neck": {"attn": -0.5}}
    blocks = run(model, adapters, weights)
    with adapters.activated(weights):  # type: ignore[arg-type]
        assert adapters.active == weights
    for key, module in adapters.modules("a").items():
        module.scale *= 0.3 if key.endswith(".0") else 0.8  # type: ignore[operator]
    for key, module in adapters.modules("neck").items():
        module.scale = -0.5 if key.startswith("attn") else 0.0  # type: ignore[assignment]
    assert close(run(model, adapters, ["a", "neck"]), blocks)


def test_block_weights_merge(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    weights = {"a": {"*@layer=0": 0.3, "mlp.*": 0.8}, ak.Average("a", "b"): {"attn.q": 2.0}}
    unmerged = run(model, adapters, weights)
    with adapters.merged(weights):  # type: ignore[arg-type]
        assert close(model(X), unmerged)


def test_a_function_of_point_and_step(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate({"a": lambda point, step: 0.1 * step + (0.5 if point.tags.get("layer") == 1 else 0.0)})
    expected = {step: {"a": {"*@layer=1": 0.1 * step + 0.5, "*": 0.1 * step}} for step in (0, 3)}
    assert close(model(X), run(model, adapters, expected[0]))
    adapters.at_step(3)
    at_three = model(X)
    assert close(at_three, run(model, adapters, expected[3]))
    with adapters.activated({"a": lambda point, step: float(step)}):
        assert close(model(X), run(model, adapters, None))
        assert adapters.on_step_end(None, 1, None, {"latents": 1}) == {"latents": 1}
        assert close(model(X), run(model, adapters, {"a": 2.0}))
    assert torch.equal(model(X), at_three)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (ak.Stack("a", "nope"), "unknown adapter 'nope'. Did you mean"),
        ({"a": {"cross.*": 1.0}}, "invalid weights: 'cross.*' matches no point of 'a' (roles: attn."),
        (
            {"a": {"attn.q": "x"}},
            "invalid weights: the weight of 'a' at attn.q@toy.0 must be a finite number, a number",
        ),
        ({"a": {"attn.q": "x"}}, "or a function of (point, step), not 'x'"),
        ({"a": lambda point, step: None}, "(point, step), not None"),
        (
            {"a": lambda point, step: 1 / 0},
            "function of 'a' raised ZeroDivisionError at attn.q@toy.0: division by zero",
        ),
        ({"kv": {"attn.kv@layer=0": -1.0}}, "'kv' multiplies attention at attn.kv@toy.0, so its weight must not be"),
        ({"kv": {"attn.kv@layer=0": -1.5}}, "negative, but it is -1.5"),
        ({"kv": lambda point, step: -1}, "must not be negative, but it is -1"),
        (
            [ak.Stack("a"), ak.Stack("a")],
            "invalid activate(): Stack('a') is named twice; give it a weight: {Stack('a'): 2.0}",
        ),
        (3, "invalid activate(): expected a name, names, a mapping of names to weights, or None, not 3"),
        ({3: 1.0}, "invalid adapters: expected a name or an expression such as Stack('a', 'b'), not 3"),
        ([["a"]], "such as Stack('a', 'b'), not ['a']"),
        ({"a": 10**400}, "the weight of 'a' must be a finite number"),
        ({"a": float("nan")}, "(point, step), not nan"),
        ({"a": torch.ones(2, 3, 1)}, "floating-point tensor [rows] or [rows, tokens], not (2, 3, 1) of torch.float32"),
        ({"a": torch.ones(2).int()}, "invalid weights: 'a': a weight must be a floating-point tensor [rows]"),
        ({"kv": torch.ones(2)}, "'kv' cannot be weighted for each row: at attn.kv@toy.0 there is no output of its own"),
    ],
)
def test_wrong_choices(model: toys.ToyModel, adapters: ak.Adapters, choice: object, message: str) -> None:
    adapters.activate("a")
    with pytest.raises(errors.AdapterKitError, match=re.escape(message)):
        adapters.activate(choice)  # type: ignore[arg-type]
    assert adapters.active == {"a": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ak.Stack(), "at least one"),
        (lambda: ak.Average("a", 3), "not 3"),  # type: ignore[arg-type]
        (lambda: ak.Split({"a": 3}), "must be \\(start, stop\\)"),  # type: ignore[dict-item]
        (lambda: ak.Split(["a"]), "expected a mapping"),  # type: ignore[arg-type]
        (lambda: ak.Split({"a": (0, True)}), "must be \\(start, stop\\)"),
    ],
)
def test_wrong_expressions(make: object, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        make()  # type: ignore[operator]


def test_expressions_are_values() -> None:
    each = [ak.Stack("a", ak.Average("b", "c")), ak.Split({"a": (0, 3), ak.Stack("b"): (3, None)}), ak.Parallel("a")]
    for one in each:
        assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one) == eval(repr(one), dict(vars(ak)))
        assert hash(one) == hash(copy.deepcopy(one))
    assert each[0].names == ("a", "b", "c")
    assert ak.Stack("a") != ak.Parallel("a")


def test_rows_take_expressions_too(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    routes = [ak.Stack("a", "neck"), None, ak.Average("a", "b")]
    with adapters.routed(routes):
        together = model(X)
    for i, route in enumerate(routes):
        assert close(together[i], run(model, adapters, route)[i])


def test_an_active_expression_goes_with_its_part(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate({ak.Stack("a", "b"): 1.0, "neck": 0.5})
    adapters.remove("b")
    assert adapters.active == {"neck": 0.5}


def test_a_composition_is_copied_and_pickled_along(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate({ak.Stack("a", "neck"): {"*": 0.7}, ak.Average("a", "b"): -1.0})
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), y)


# -- Fuse -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(model: toys.ToyModel, necks: ak.Adapters) -> ak.Adapters:
    necks.add("fusion", ak.Fuse(parts=("neck", "other"), temperature=2.0))
    randomize(necks, "fusion", 5)
    return necks


def test_fusion_is_its_equation(model: toys.ToyModel, fused: ak.Adapters) -> None:
    y = run(model, fused, "fusion")
    sublayers = Sublayers(model, fused)
    blocks: Any = model.blocks
    with fused.disabled():
        h = model.embed(X)
        for i, block in enumerate(blocks):
            h = h + block.attn(block.norm1(h))[0]
            s = block.mlp(block.norm2(h))
            u = [sublayers.at(i, name, s, h) - s for name in ("neck", "other")]
            fusion = fused.modules("fusion")[f"mlp@toy.{i}"]
            query = (h + s) @ fusion.query.weight.mT + fusion.query.bias  # type: ignore[union-attr,operator]
            logits = torch.stack([(query * (one @ fusion.key.weight.mT)).sum(-1) for one in u])  # type: ignore
            p = (logits / 2.0).softmax(0)
            s = s + sum(p[j][..., None] * (u[j] @ fusion.value.mT) for j in range(2))  # type: ignore[union-attr,operator]
            h = h + s
            h = h + block.conv(h.mT).mT
        expected = model.head(model.norm(h))
    assert close(y, expected)


def test_only_the_fusion_trains(model: toys.ToyModel, fused: ak.Adapters) -> None:
    fused.activate("fusion")
    (model(X).square().mean() + fused.penalty()).backward()
    assert all(parameter.grad is not None for parameter in fused.parameters("fusion"))
    assert all(parameter.grad is None for parameter in fused.parameters("neck", "other"))


def test_the_penalty_keeps_the_values_near_the_identity(model: toys.ToyModel, fused: ak.Adapters) -> None:
    modules = fused.modules("fusion").values()
    expected = sum(0.01 * (torch.eye(toys.WIDTH) - m.value).square().sum() for m in modules)  # type: ignore[operator]
    assert close(fused.penalty("fusion"), expected)  # type: ignore[arg-type]
    assert fused.penalty("neck") == 0.0


def test_a_fusion_needs_its_parts(model: toys.ToyModel, fused: ak.Adapters) -> None:
    with pytest.raises(errors.StateError, match="'fusion' combines 'neck'"):
        fused.remove("neck")
    with pytest.raises(errors.ConfigError, match="its part 'nope' is not attached"):
        fused.add("second", ak.Fuse(parts=("neck", "nope")))
    assert "second" not in fused
    before = run(model, fused, None)
    fused.detach()
    assert torch.equal(model(X), before)


def test_a_fusion_loses_nothing_of_its_parts(model: toys.ToyModel, necks: ak.Adapters) -> None:
    necks.add("wide", ak.Bottleneck(targets="attn mlp", reduction=2))
    lost = r"its part 'wide' acts at attn@toy\.0.* would be lost; widen its targets"
    with pytest.raises(errors.ConfigError, match=lost):
        necks.add("fusion", ak.Fuse(parts=("neck", "wide"), targets="mlp"))
    assert "fusion" not in necks
    necks.add("fusion", ak.Fuse(parts=("neck", "wide"), targets="attn mlp"))


def test_a_fusion_survives_copies_and_files(model: toys.ToyModel, fused: ak.Adapters) -> None:
    y = run(model, fused, "fusion")
    checkpoints = {name: fused.checkpoint(name) for name in fused}
    other = copy.deepcopy(model)
    assert torch.equal(run(other, ak.Adapters(other), "fusion"), y)
    fused.detach()
    for name, checkpoint in checkpoints.items():
        fused.install(name, checkpoint)
    assert torch.equal(run(model, fused, "fusion"), y)


@pytest.mark.parametrize("routes", [["fusion", None, "neck"]])
def test_a_fusion_routes(model: toys.ToyModel, fused: ak.Adapters, routes: list[str | None]) -> None:
    with fused.routed(routes):
        together = model(X)
    for i, route in enumerate(routes):
        assert close(together[i], run(model, fused, route)[i])


# -- Union ----------------------------------------------------------------------------------------------------------

MAM = ak.Union((ak.Prefix(length=2), ak.Bottleneck(form="parallel", targets="mlp", reduction=2)))
TWICE = ak.Union((ak.LoRA(rank=2, targets="attn.q"), ak.LoRA(rank=3, targets="attn.* mlp.up")))


@pytest.mark.parametrize("union", [MAM, TWICE])
def test_a_union_is_its_parts_together(model: toys.ToyModel, union: ak.Union) -> None:
    adapters = ak.Adapters(model)
    adapters.add("union", union)
    randomize(adapters, "union", 1)
    y = run(model, adapters, "union")
    for place, part in enumerate(union.parts):
        adapters.add(f"p{place}", part)
        for key, module in adapters.modules(f"p{place}").items():
            member: Any = adapters.modules("union")[key].members[str(place)]  # type: ignore[union-attr,index]
            module.load_state_dict(member.state_dict())
    assert close(run(model, adapters, ["p0", "p1"]), y)


def test_a_union_merges_saves_and_loads(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("union", TWICE)
    randomize(adapters, "union", 1)
    y = model(X)
    with adapters.merged():
        assert close(model(X), y)
    checkpoint = adapters.checkpoint("union")
    assert ak.Union.from_dict(checkpoint.config) == TWICE
    adapters.detach()
    adapters.install("again", checkpoint)
    assert torch.equal(run(model, adapters, "again"), y)


def test_gates_weigh_the_effects(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("plain", ak.LoRA(rank=2, targets="attn.q conv"))
    randomize(adapters, "plain", 3)
    adapters.add("gated", ak.Union((ak.LoRA(rank=2, targets="attn.q conv"),), gating=True))
    for key, module in adapters.modules("plain").items():
        adapters.modules("gated")[key].members["0"].load_state_dict(module.state_dict())  # type: ignore[union-attr,index]
    assert close(run(model, adapters, "gated"), run(model, adapters, {"plain": 0.5}))  # gates start at 1/2
    generator = torch.Generator().manual_seed(0)
    for key in ("attn.q@toy.0", "conv@toy.0"):
        gated = adapters.modules("gated")[key]
        gate = gated.gates["0"]  # type: ignore[union-attr,index]
        gate.weight.data.normal_(generator=generator)  # type: ignore[union-attr,operator]
        gate.bias.data.fill_(0.3)  # type: ignore[union-attr,operator]
        x = torch.randn(2, toys.WIDTH, 4, generator=generator, dtype=torch.float64)
        x = x if key.startswith("conv") else x.mT
        y = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        features = y.mT if key.startswith("conv") else y
        g = torch.sigmoid((features * gate.weight).sum(-1, keepdim=True) + 0.3)  # type: ignore[operator]
        g = g.mT if key.startswith("conv") else g
        effect = adapters.modules("plain")[key](x, lambda _, y=y: y) - y
        assert close(gated(x, lambda _, y=y: y), y + g * effect)


def test_a_gate_scales_a_prefix(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("gated", ak.Union((ak.Prefix(length=2),), gating=True))
    randomize(adapters, "gated", 4)
    adapters.add("plain", ak.Prefix(length=2))
    for key, module in adapters.modules("gated").items():
        g = torch.sigmoid(module.gates["0"].bias.detach())  # type: ignore[union-attr,index,operator]
        adapters.modules("plain")[key].load_state_dict(
            {name: g * tensor for name, tensor in module.members["0"].state_dict().items()}  # type: ignore[union-attr,index]
        )
    assert close(run(model, adapters, "gated"), run(model, adapters, "plain"))


def test_a_union_observes_for_its_parts(model: toys.ToyModel) -> None:
    part = ak.LoRA(rank=2, targets="mlp.up", init="eva")
    adapters = ak.Adapters(model)
    adapters.add("alone", part)
    adapters.add("union", ak.Union((part, ak.LoRA(rank=2, targets="attn.q"))))
    assert adapters.config("union").observations == part.observations > 0
    for name in ("alone", "union"):
        with adapters.observing(name):
            model(X)
    for key, module in adapters.modules("alone").items():
        member = adapters.modules("union")[key].members["0"]  # type: ignore[union-attr,index]
        assert torch.equal(member.A, module.A)  # type: ignore[union-attr,arg-type]
    with pytest.raises(RuntimeError), adapters.observing("union"):
        model(model(X))  # the second is given no indices
    with pytest.raises(errors.ConfigError, match="the inputs had 0 directions"), adapters.observing("union"):
        pass


@pytest.mark.parametrize("gating", [True, False])
def test_what_replaces_a_weight_is_no_part_of_a_sum(model: toys.ToyModel, gating: bool) -> None:
    classes, beside = ak.Trainable("head", outputs=3), ak.LoRA(rank=2, targets="head" if not gating else "mlp.up")
    adapters = ak.Adapters(model)
    with pytest.raises(errors.IncompatibleTargetError, match="acts or does not at head"):
        adapters.add("union", ak.Union((classes, beside), gating=gating))
    adapters.add("union", ak.Union((classes, ak.LoRA(rank=2, targets="mlp.up"))))
    assert run(model, adapters, "union").shape[-1] == 3
    with pytest.raises(errors.ConfigError, match="its weight must be 1"):
        adapters.activate({"union": 0.5})


def test_what_replaces_a_weight_acts_as_a_whole(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("head", ak.Trainable("head", outputs=3))
    adapters.add("b", ak.LoRA(rank=2, targets="mlp.up"))
    adapters.add("same", ak.LoRA(rank=2, targets="head"))
    for choice, message in (
        (
            ak.Average("head", "b"),
            "has 'head' with weight 0.5, but it acts or does not at head@toy: its weight must be 1",
        ),
        (ak.Split({"head": (0, 2)}), "splits 'head', but it acts or does not at head@toy"),
        (["head", "same"], "'head' acts or does not at head@toy, and not beside 'same'"),
        (ak.Parallel("head", "head"), "has 'head' with weight 2, but it acts or does not"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            adapters.activate(choice)  # type: ignore[arg-type]
    for choice in (["head", "b"], ak.Parallel("head", "b"), {"head": {"head": 1.0}, "same": {"head": 0.0}}):
        assert run(model, adapters, choice).shape[-1] == 3


def test_a_fusion_is_no_part_of_a_union(model: toys.ToyModel, fused: ak.Adapters) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match="combines adapters"):
        fused.add("union", ak.Union((ak.Fuse(parts=("neck", "other"), targets="mlp"),)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ak.Union(()), "at least one adapter config"),
        (lambda: ak.Union((ak.LoRA(),), targets="attn.q"), "targets must be 'all'"),
        (lambda: ak.Union.from_dict({"parts": [{"type": "lora"}]}), "a type and a config"),
        (lambda: ak.Union.from_dict({"parts": 3}), "parts must be a list"),
        (lambda: ak.Union.from_dict({"parts": [{"type": "lorra", "config": {}}]}), "lorra"),
        (lambda: ak.Fuse(), "parts must be a tuple"),
        (lambda: ak.Fuse(parts=("a", "a")), "parts must be a tuple"),
        (lambda: ak.Fuse(parts=("a",), temperature=0), "temperature"),
    ],
)
def test_wrong_configs(make: object, message: str) -> None:
    with pytest.raises(errors.AdapterKitError, match=message):
        make()  # type: ignore[operator]


# -- torch.compile --------------------------------------------------------------------------------------------------


def test_other_weights_need_no_other_program() -> None:
    toys.register()
    model = toys.ToyModel(layers=1).double().eval()
    adapters = adapted(model)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    structures: list[list[object]] = [
        [{"a": 1.0}, {"a": 0.5}, {"a": -0.3}],
        [{"a": 0.5, "neck": 1.0}, {"a": 0.2, "neck": 0.3}],
        ["kv", {"kv": 0.5}],
        [{"a": {"*@layer=0": 0.3, "*": 0.8}}, {"a": {"*": 1.0}}, {"a": lambda point, step: 0.25 + step}],
        [ak.Stack("a", "neck"), {ak.Stack("a", "neck"): 0.5}],
    ]
    for programs, choices in enumerate(structures, 1):
        for choice in choices:
            adapters.activate(choice)  # type: ignore[arg-type]
            with torch.no_grad():
                assert close(compiled(X), model(X))
            assert counter.frame_count == programs
