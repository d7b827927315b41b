"""Bottlenecks against AdapterHub's published steps, written out here, in post-norm and pre-norm blocks of real models.

AdapterHub computes with flags: `before` (the block's residual sum and norm in front of the adapter), `residual` (what
is added to the adapter: `s` before the norm, "post_add" after the sum, or the adapter's input `h`), `after` (sum and
norm behind it). In a pre-norm block there is no norm, only the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from tests.backends.language_models import build, output, shake, tokens
from tests.backends.vision_models import images, timm_vit

Norm = Callable[[Tensor], Tensor]
Net = Callable[[Tensor], Tensor]
EXACT = {"rtol": 1e-10, "atol": 1e-10}

SEQ = {"before": True, "residual": "s", "after": True}
DOUBLE = {"before": False, "residual": "s", "after": True}
PAR = {"parallel": True, "before": False, "residual": "s", "after": True}
PLUS = {"before": True, "residual": "h", "after": False}


def adapterhub(flags: dict[str, Any], net: Net, s: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
    """The output of a block's sublayer, its residual sum and its norm, with an adapter."""
    behind: Norm = norm or (lambda t: t)
    h = behind(s + x) if flags["before"] else s
    r = {"s": s, "post_add": s + x, "h": h}[flags["residual"]]
    o = net(x if flags.get("parallel") else h) + r
    return behind(o + x) if flags["after"] else o


# AdapterHub's config -> ours, and its flags where it acts.
CONFIGS: dict[str, tuple[ak.AdapterConfig, dict[str, dict[str, Any]]]] = {
    "seq_bn": (ak.Bottleneck.pfeiffer(reduction=4), {"mlp": SEQ}),
    "seq_bn after attention": (ak.Bottleneck.pfeiffer(targets="attn", width=3), {"attn": SEQ}),
    "double_seq_bn": (ak.Bottleneck.houlsby(reduction=4), {"attn": DOUBLE, "mlp": DOUBLE}),
    "par_bn": (ak.Bottleneck.parallel(), {"mlp": PAR}),
    "adapter_plus": (ak.Bottleneck.adapter_plus(), {"hidden": PLUS}),
    "compacter": (ak.Compacter(), {"attn": DOUBLE, "mlp": DOUBLE}),
    "compacter++": (ak.Compacter.plus_plus(rank=2, width=8), {"mlp": SEQ}),
    "post_add": (ak.Bottleneck.pfeiffer(width=3, residual="sum"), {"mlp": {**SEQ, "residual": "post_add"}}),
    "residual after norm": (ak.Bottleneck.pfeiffer(width=3, residual="input"), {"mlp": {**SEQ, "residual": "h"}}),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    return {"relu": torch.relu, "silu": lambda z: z * torch.sigmoid(z), "gelu": lambda z: F.gelu(z)}[name]


def net_of(module: Any) -> Net:
    """`scale * up(f(down(h)))` from the parameters, for a plain network and for Compacter's."""
    f, scale = activation(module.config.activation), module.scale

    def layer(h: Tensor, which: Any) -> Tensor:
        if isinstance(which, nn.Linear):
            return h @ which.weight.mT + which.bias
        products = [torch.kron(s, a @ b) for s, a, b in zip(module.shared.rule, which.left, which.right, strict=True)]
        return h @ torch.stack(products).sum(0) + which.bias

    return lambda h: scale * layer(f(layer(h, module.down)), module.up)


Sublayers = list[tuple[str, Callable[[Tensor], Tensor], nn.Module]]
"""Role, the sublayer without its norms, and the norm beside it."""


def llama(block: Any, rest: dict[str, Any]) -> Sublayers:
    attention = ("attn", lambda h: block.self_attn(h, **rest)[0], block.input_layernorm)
    return [attention, ("mlp", block.mlp, block.post_attention_layernorm)]


def gpt2(block: Any, rest: dict[str, Any]) -> Sublayers:
    return [("attn", lambda h: block.attn(h)[0], block.ln_1), ("mlp", block.mlp, block.ln_2)]


def bert(block: Any, rest: dict[str, Any]) -> Sublayers:
    inner = block.attention
    return [
        ("attn", lambda h: inner.output.dense(inner.self(h)[0]), inner.output.LayerNorm),
        ("mlp", lambda h: block.output.dense(block.intermediate(h)), block.output.LayerNorm),
    ]


def vit(block: Any, rest: dict[str, Any]) -> Sublayers:
    return [("attn", block.attn, block.norm1), ("mlp", block.mlp, block.norm2)]


def timm_model() -> nn.Module:
    torch.manual_seed(4)
    model = timm_vit().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


# Model -> how it is built and run, its component, its blocks' path, their sublayers, and whether they are post-norm.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str, str, Callable[..., Sublayers], bool]] = {
    "Bert": (lambda: build("Bert"), lambda m: output(m, tokens()), "language", "encoder.layer", bert, True),
    "GPT2": (lambda: build("GPT2"), lambda m: output(m, tokens()), "language", "transformer.h", gpt2, False),
    "Llama": (lambda: build("Llama"), lambda m: output(m, tokens()), "language", "model.layers", llama, False),
    "ViT": (timm_model, lambda m: m(images(dtype=torch.float64)), "vision", "blocks", vit, False),
}


def seen_by_blocks(model: Any, path: str, run: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Input, keyword arguments and output of every block in one run."""
    seen: list[dict[str, Any]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], result: Any) -> None:
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")}
        x = args[0] if args else kwargs["hidden_states"]
        seen.append({"x": x, "rest": rest, "y": result[0] if isinstance(result, tuple) else result})

    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in model.get_submodule(path)]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


def block_output(flags: dict[str, Any], nets: dict[str, Net], x: Tensor, sublayers: Sublayers, post: bool) -> Tensor:
    for role, sublayer, norm in sublayers:
        s = sublayer(x if post else norm(x))
        behind = norm if post else None
        at = "hidden" if role == "mlp" and "hidden" in flags else role
        plain = norm(s + x) if post else s + x
        x = adapterhub(flags[at], nets[at], s, x, behind) if at in flags else plain
    return x


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("kind", list(MODELS))
def test_every_block_is_adapterhubs(kind: str, name: str) -> None:
    """Every layer with its own norm, weights and adapter (AdapterHub's plug-in hooks used the last layer's norm)."""
    make, run, component, path, sublayers_of, post = MODELS[kind]
    config, flags = CONFIGS[name]
    plain, model = make(), make()
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    shake(adapters)
    model.eval()
    modules = adapters.modules("a")
    seen = seen_by_blocks(model, path, run)
    assert len(modules) == len(seen) * len(flags)
    for layer, (block, at) in enumerate(zip(plain.get_submodule(path), seen, strict=True)):
        nets = {role: net_of(modules[f"{role}@{component}.{layer}"]) for role in flags}
        expected = block_output(flags, nets, at["x"], sublayers_of(block, at["rest"]), post)
        torch.testing.assert_close(at["y"], expected, **EXACT)
        unadapted = block_output({}, {}, at["x"], sublayers_of(block, at["rest"]), post)
        assert (expected - unadapted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "ViT"])
def test_adapter_plus_in_a_pre_norm_block_is_pfeiffers_form(kind: str) -> None:
    """`A(s + x) + s + x`: behind the block, or in front of its last sum."""
    make, run, *_ = MODELS[kind]
    outputs = []
    for changes in ({}, {"targets": "mlp", "form": "pfeiffer"}):
        model = make()
        adapters = ak.Adapters(model)
        adapters.add("a", ak.Bottleneck.adapter_plus(**changes))
        shake(adapters)
        outputs.append(run(model.eval()))
    torch.testing.assert_close(outputs[0], outputs[1], **EXACT)


def test_cross_attention_does_not_replace_self_attention() -> None:
    """AdapterHub's plug-in kept one dictionary of adapters for both, and the second overwrote the first."""
    options = {"head": "BertLMHeadModel", "is_decoder": True, "add_cross_attention": True}
    states = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    model, plain = build("Bert", **options), build("Bert", **options)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(targets="attn cross mlp", form="houlsby", width=5))
    shake(adapters)
    inner, parts = plain.bert.encoder.layer[1], {}
    seen = seen_by_blocks(model, "bert.encoder.layer", lambda m: m(tokens(), encoder_hidden_states=states))
    for role in ("attn", "cross", "mlp"):
        parts[role] = net_of(adapters.modules("a")[f"{role}@language.1"])
    x, length = seen[1]["x"], tokens().shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    steps = (
        ("attn", lambda h: inner.attention.output.dense(inner.attention.self(h, attention_mask=causal)[0])),
        ("cross", lambda h: inner.crossattention.output.dense(inner.crossattention.self(h, states)[0])),
        ("mlp", lambda h: inner.output.dense(inner.intermediate(h))),
    )
    norms = (inner.attention.output.LayerNorm, inner.crossattention.output.LayerNorm, inner.output.LayerNorm)
    for (role, sublayer), norm in zip(steps, norms, strict=True):
        x = adapterhub(DOUBLE, parts[role], sublayer(x), x, norm)
    torch.testing.assert_close(seen[1]["y"], x, **EXACT)


def test_hidden_widths_are_adapterhubs() -> None:
    """int(hidden / reduction), at least 1: for a width of 768, that of BERT."""
    point = next(p for p in ak.points(build("Bert")) if p.role == "mlp")
    wide = dataclasses.replace(point, in_features=768, out_features=768)
    widths = {ak.Bottleneck.pfeiffer(): 48, ak.Bottleneck.parallel(): 384, ak.Compacter(): 24}
    assert {config: config.width_at(wide) for config in widths} == widths
