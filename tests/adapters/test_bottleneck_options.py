"""Bottleneck's further options, each against its equation, and the published forms that they make up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapters.bottleneck import INITS, INPUTS, RESIDUALS, Bottleneck
from adapterkit.errors import ConfigError, IncompatibleTargetError
from adapterkit.points import OutputLayout, OutputPoint
from adapterkit.testing import toys
from tests.adapters.test_bottleneck import BLOCKS, FEATURES, Block, built, network, stream

SANDWICH = Block(True, True)


def sublayer_input(form: str, block: Block, s: Tensor, x: Tensor) -> Tensor:
    return {"pfeiffer": block.post(s + x), "houlsby": s, "parallel": x, "parallel_norm": block.pre(x)}[form]


@pytest.mark.parametrize("residual", list(RESIDUALS))
@pytest.mark.parametrize("form", list(INPUTS))
def test_residuals(form: str, residual: str) -> None:
    module, x = built(Bottleneck(form=form, residual=residual)), stream()
    s = SANDWICH.sublayer(x)
    h = sublayer_input(form, SANDWICH, s, x)
    r = {"sublayer": s, "sum": s + x, "input": h}[residual]
    assert torch.allclose(module(x, SANDWICH), network(module, h) + r, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "neutral"),
    [
        ({}, True),
        ({"init": "mam"}, True),
        ({"init": "bert"}, False),
        ({"residual": "sum"}, False),
        ({"residual": "input"}, False),
        ({"norm_after": "network"}, False),
        ({"norm_after": "sum"}, False),
        ({"gating": True, "norm_before": True, "dropout": 0.5}, True),
    ],
)
def test_it_is_neutral_where_its_start_has_no_effect(options: dict[str, Any], neutral: bool) -> None:
    config = Bottleneck(width=3, form="parallel", **options)
    assert config.neutral is neutral
    block, x = BLOCKS["pre-norm"], stream()
    module = built(config, randomise=False).eval()
    if neutral:
        assert torch.allclose(module(x, block), block.sublayer(x), atol=1e-12)


def test_post_add_in_a_pre_norm_block() -> None:
    """AdapterHub had no residual there: its `residual_before_ln="post_add"` ended in an UnboundLocalError."""
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="pfeiffer", residual="sum"))
    s = block.sublayer(x)
    assert torch.allclose(x + module(x, block), network(module, s + x) + (s + x) + x, atol=1e-12)


def own_norm(norm: Any, h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def test_norm_before() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck.adaptformer(norm_before=True)).eval()
    expected = block.sublayer(x) + 0.1 * network(module, own_norm(module.norm_before, x))
    assert torch.allclose(module(x, block), expected, atol=1e-12)


@pytest.mark.parametrize("over", ["network", "sum"])
def test_norm_after(over: str) -> None:
    block, x = BLOCKS["post-norm"], stream()
    module = built(Bottleneck(form="houlsby", norm_after=over))
    s = block.sublayer(x)
    u = network(module, s)
    expected = s + own_norm(module.norm_after, u) if over == "network" else own_norm(module.norm_after, s + u)
    assert torch.allclose(module(x, block), expected, atol=1e-12)


def test_the_gate_is_one_number_a_token_and_sees_no_other() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="houlsby", gating=True))
    s = block.sublayer(x)
    gate = 1 / (1 + torch.exp(-(s @ module.gate.weight[0] + module.gate.bias)))
    assert torch.allclose(module(x, block), s + gate[..., None] * network(module, s), atol=1e-12)
    start = x[:, :2]
    assert torch.allclose(module(x, block)[:, :2], module(start, block), atol=1e-12)
    # AdapterHub's gate is the mean over the sequence: ours for a sequence of one token.
    one = x[:, :1]
    mean = gate[:, :1].mean(1, keepdim=True)[..., None]
    assert torch.allclose(module(one, block), s[:, :1] + mean * network(module, s[:, :1]), atol=1e-12)


def test_one_learnt_factor_a_channel() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="houlsby", scaling="channel"))
    assert module.scale.shape == (FEATURES,)
    s = block.sublayer(x)
    assert torch.allclose(module(x, block), s + module.scale * network(module, s), atol=1e-12)
    fresh = built(Bottleneck(scaling="channel"), randomise=False)
    assert torch.equal(fresh.scale, torch.ones(FEATURES, dtype=torch.float64))


def test_drop_path_drops_whole_samples_and_scales_the_others() -> None:
    torch.manual_seed(3)
    block, x = BLOCKS["pre-norm"], torch.randn(64, 3, FEATURES, dtype=torch.float64)
    module = built(Bottleneck(form="houlsby", drop_path=0.25))
    s = block.sublayer(x)
    effect = module(x, block) - s
    kept = effect.flatten(1).any(1).double()
    assert torch.allclose(effect, kept[:, None, None] / 0.75 * network(module, s), atol=1e-12)
    assert 0.6 < kept.mean() < 0.9
    assert torch.allclose(module.eval()(x, block), s + network(module, s), atol=1e-12)


def test_hidden_dropout() -> None:
    block, x = BLOCKS["pre-norm"], stream()
    module = built(Bottleneck(form="houlsby", hidden_dropout=0.5, width=6))
    s = block.sublayer(x)
    torch.manual_seed(3)
    trained = module(x, block)
    torch.manual_seed(3)
    hidden = F.dropout(F.relu(s @ module.down.weight.mT + module.down.bias), 0.5)
    assert torch.allclose(trained, s + hidden @ module.up.weight.mT + module.up.bias, atol=1e-12)
    assert torch.allclose(module.eval()(x, block), s + network(module, s), atol=1e-12)


def test_starts() -> None:
    wide = OutputPoint("mlp", "mlp", "0", 512, 512, OutputLayout("norm"))
    for init in INITS:
        torch.manual_seed(0)
        module: Any = Bottleneck(init=init, width=256).build(wide)
        down, up = module.down.weight.detach(), module.up.weight.detach()
        assert module.up.bias.abs().max() == 0
        assert (module.down.bias.abs().max() == 0) == (init != "lora")
        if init in ("lora", "mam"):
            assert up.abs().max() == 0
            assert abs(down.std().item() / (1 / math.sqrt(3 * 512)) - 1) < 0.02
            continue
        for weight in (down, up):
            cut = weight.abs().max().item()
            if init == "bert":
                assert abs(weight.std().item() / 0.02 - 1) < 0.02
                assert cut > 0.06
            else:  # a normal cut at two deviations has 0.8796 of its deviation left
                assert abs(weight.std().item() / (0.01 * 0.8796) - 1) < 0.02
                assert cut <= 0.02


def test_presets_are_their_papers() -> None:
    """Targets, form, hidden width of 768 features, activation, factor and start."""
    point = OutputPoint("mlp", "mlp", "0", 768, 768, OutputLayout("norm"))
    expected = {
        Bottleneck.pfeiffer(): ("mlp", "pfeiffer", 48, "relu", 1.0, "lora"),
        Bottleneck.houlsby(): ("attn mlp", "houlsby", 48, "silu", 1.0, "lora"),
        Bottleneck.parallel(): ("mlp", "parallel", 384, "relu", 4.0, "mam"),
        Bottleneck.adapter_plus(): ("hidden", "houlsby", 8, "gelu", "channel", "houlsby"),
        Bottleneck.adaptformer(): ("mlp", "parallel", 64, "relu", 0.1, "mam"),
    }
    for config, values in expected.items():
        named = (config.targets, config.form, config.width_at(point), config.activation, config.scaling, config.init)
        assert named == values
        assert Bottleneck.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Bottleneck.adapter_plus(drop_path=0.0, targets="mlp", form="pfeiffer").drop_path == 0.0


def test_half_precision_with_every_option() -> None:
    block, x = Block(True, True).bfloat16(), stream().bfloat16()
    options = {"norm_before": True, "gating": True, "scaling": "channel", "drop_path": 0.1, "hidden_dropout": 0.1}
    for norm_after in ("network", "sum"):
        config = Bottleneck(norm_after=norm_after, residual="sum", **options)  # type: ignore[arg-type]
        module = config.build(OutputPoint("mlp", "m", "0", FEATURES, FEATURES, OutputLayout("n")))
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        y = module(x, block)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_gradients_with_every_option() -> None:
    x = stream().requires_grad_()
    config = Bottleneck(
        norm_before=True, norm_after="sum", residual="input", gating=True, scaling="channel", activation="silu", width=3
    )
    module = built(config)
    assert torch.autograd.gradcheck(lambda *_: module(x, SANDWICH), [x, *module.parameters()], fast_mode=True)


def test_no_effect_at_first() -> None:
    x = stream()
    for init in ("lora", "mam"):
        config = Bottleneck(init=init, norm_before=True, norm_after="network", gating=True, scaling="channel")
        assert torch.equal(built(config, randomise=False)(x, SANDWICH), SANDWICH.sublayer(x))


def test_pfeiffers_form_is_refused_behind_a_block() -> None:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    with pytest.raises(IncompatibleTargetError, match="form='houlsby'"):
        adapters.add("a", Bottleneck(targets="hidden"))
    adapters.add("a", Bottleneck.adapter_plus())
    assert len(adapters.modules("a")) == toys.LAYERS


WRONG: list[tuple[str, Any]] = [
    *(("init", v) for v in ("xavier", "", None, 1)),
    *(("residual", v) for v in ("post_add", "", True)),
    *(("norm_before", v) for v in (1, "yes", None)),
    *(("norm_after", v) for v in ("both", True, "")),
    *(("gating", v) for v in (1, None)),
    *((name, v) for name in ("hidden_dropout", "drop_path") for v in (1.0, -0.1, math.nan, None, True)),
    ("scaling", "channels"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        Bottleneck(**{key: value})
    assert repr(value) in str(caught.value)
