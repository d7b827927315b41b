"""Joint attention with a prefix: the softmax over more keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
)
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.seams import refusal
from adapterkit.errors import IncompatibleTargetError
from adapterkit.mapping.model import map_model
from tests.backends import diffusion_models as models
from tests.backends import vision_checks as checks

PREFIX = ak.Prefix(length=3, init_std=1.0, targets="*")
IMAGE, TEXT, HEADS, WIDTH = 6, 5, 2, 8
JOINT = {"added_kv_proj_dim": 16, "out_dim": 16, "bias": True}
ATTENTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd3": (Attention, {**JOINT, "context_pre_only": False}),
    "sd3 normed": (Attention, {**JOINT, "context_pre_only": False, "qk_norm": "rms_norm"}),
    "sd3 last": (Attention, {**JOINT, "context_pre_only": True, "qk_norm": "rms_norm"}),
    "sd3 image alone": (Attention, {"out_dim": 16, "qk_norm": "rms_norm"}),
    "flux double": (FluxAttention, {**JOINT, "context_pre_only": False, "dropout": 0.2}),
    "flux single": (FluxAttention, {"out_dim": 16, "bias": True, "pre_only": True}),
}


def attention(name: str) -> Any:
    cls, options = ATTENTIONS[name]
    processor = JointAttnProcessor2_0() if cls is Attention else FluxAttnProcessor()
    made = cls(query_dim=16, heads=HEADS, dim_head=WIDTH, processor=processor, **options)  # type: ignore[call-arg]
    return randomised(made)


def randomised(module: nn.Module) -> Any:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return module.double().eval().requires_grad_(False)


def given(name: str, masked: str, rotary: bool) -> dict[str, Any]:
    """What the module is called with, besides the image."""
    generator = torch.Generator().manual_seed(2)
    joint = "single" not in name and "alone" not in name
    length = IMAGE + (TEXT if joint else 0)
    found: dict[str, Any] = {}
    if joint:
        found["encoder_hidden_states"] = torch.randn(2, TEXT, 16, generator=generator).double()
    if masked:
        keep = torch.rand(2, length, generator=generator) > 0.4
        found["attention_mask"] = keep if masked == "2d" else keep[:, None, None].double().log()
    if rotary:
        angles = torch.randn(length, WIDTH // 2, generator=generator).repeat_interleave(2, dim=1)
        found["image_rotary_emb"] = (angles.cos(), angles.sin())
    return found


def image() -> Tensor:
    return torch.randn(2, IMAGE, 16, generator=torch.Generator().manual_seed(4)).double()


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def reference(module: Any, x: Tensor, text: Tensor | None, rotary: Any, prefix: Any, weight: float) -> list[Tensor]:
    """Softmax by its definition over [prefix; tokens of both streams]; the streams' outputs, image first.

    The order of the streams matters to the rotary embedding alone, which is Flux's, where the text comes first.
    """

    def heads(layer: Any, source: Tensor, norm: Any) -> Tensor:
        y = layer(source).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return y if norm is None else norm(y)

    def norm(name: str) -> Any:
        return getattr(module, name, None)

    query, key = heads(module.to_q, x, norm("norm_q")), heads(module.to_k, x, norm("norm_k"))
    value = heads(module.to_v, x, None)
    if text is not None:
        query = torch.cat([heads(module.add_q_proj, text, norm("norm_added_q")), query], dim=2)
        key = torch.cat([heads(module.add_k_proj, text, norm("norm_added_k")), key], dim=2)
        value = torch.cat([heads(module.add_v_proj, text, None), value], dim=2)
    if rotary is not None:
        query, key = apply_rotary_emb(query, rotary), apply_rotary_emb(key, rotary)
    front = torch.full((1, 1, 1, prefix.keys.shape[1]), weight, dtype=x.dtype).log()
    mask = torch.cat([front, torch.zeros(1, 1, 1, key.shape[2], dtype=x.dtype)], dim=-1)
    mixed = checks.soft(query, *checks.prefixed(prefix, key, value), WIDTH**-0.5, mask).transpose(1, 2).flatten(2)
    of_image = mixed[:, -IMAGE:]
    outputs = [of_image if getattr(module, "to_out", None) is None else module.to_out[0](of_image)]
    if text is not None:
        of_text = mixed[:, :TEXT]
        outputs.append(of_text if getattr(module, "to_add_out", None) is None else module.to_add_out(of_text))
    return outputs


PLACES = {
    "sd3": ("attn.kv@transformer.0", "transformer_blocks.0.attn"),
    "sd3 last": ("attn.kv@transformer.1", "transformer_blocks.1.attn"),
    "sd3 image alone": ("attn.kv@transformer.0.dual", "transformer_blocks.0.attn2"),
    "flux double": ("attn.kv@transformer.double.1", "transformer_blocks.1.attn"),
    "flux single": ("attn.kv@transformer.single.0", "single_transformer_blocks.0.attn"),
}


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("name", PLACES)
def test_prefix_is_softmax_over_more_keys_for_both_streams(name: str, weight: float) -> None:
    model: Any = models.FAMILIES[name.split()[0]]().double()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    adapters.activate({"a": weight})
    point, path = PLACES[name]
    inputs = given(name, "", rotary=name.startswith("flux"))
    module = model.get_submodule(path)
    rest = (inputs.get("encoder_hidden_states"), inputs.get("image_rotary_emb"))
    expected = reference(module, image(), *rest, adapters.modules("a")[point], weight)
    for one, other in zip(as_tuple(module(image(), **inputs)), expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PLACES)
def test_prefix_in_half_precision_does_what_it_does_in_full(name: str) -> None:
    """Its parameters are float32; they join keys of the model's dtype, and what comes out is of that dtype."""
    full: Any = models.FAMILIES[name.split()[0]]()
    half = copy.deepcopy(full).bfloat16()
    inputs, outputs = given(name, "", rotary=False), []
    for model in (full, half):
        cast = {key: value.to(model.dtype) for key, value in inputs.items()}
        module = model.get_submodule(PLACES[name][1])
        base = as_tuple(module(image().to(model.dtype), **cast))[0]
        adapters = ak.Adapters(model)
        adapters.add("a", PREFIX)
        checks.randomise(adapters, scale=1.0)
        outputs.append((base, as_tuple(module(image().to(model.dtype), **cast))[0]))
    (base, expected), (_, actual) = outputs
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.1 * (expected - base).norm()


class OldProcessor:
    """The name of Flux's processor before diffusers 0.35, which took an `Attention`."""


OldProcessor.__module__, OldProcessor.__name__ = "diffusers.models.attention_processor", "FluxAttnProcessor2_0"


def with_old_attentions(model: Any) -> Any:
    """Flux as older releases build it, with the weights of a given new one."""
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        joint = {**JOINT, "context_pre_only": False} if block in [*model.transformer_blocks] else {"pre_only": True}
        sizes = {"query_dim": 16, "heads": HEADS, "dim_head": WIDTH, "out_dim": 16, "bias": True, "qk_norm": "rms_norm"}
        old = Attention(**{**sizes, **joint}, eps=1e-6, processor=OldProcessor())
        old.load_state_dict(block.attn.state_dict())
        block.attn = old.to(model.dtype)
    return model


def test_old_layouts_of_flux_are_the_same_family() -> None:
    new = models.flux().double()
    old = with_old_attentions(copy.deepcopy(new))
    in_old, in_new = (map_model(model) for model in (old, new))
    assert {point.id: point for point in in_old.points()} == {point.id: point for point in in_new.points()}
    assert in_old.fingerprint(in_old.points()) == in_new.fingerprint(in_new.points())


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "autoencoder"])
def test_fused_projections_are_refused_until_they_are_unfused(name: str) -> None:
    """They are copies: adapters on the layers that were copied would do nothing."""
    model: Any = models.FAMILIES[name]()
    ids = ak.points(model).ids
    model.fuse_qkv_projections()
    with pytest.raises(IncompatibleTargetError, match="unfuse_qkv_projections"):
        ak.points(model)
    model.unfuse_qkv_projections()
    assert ak.points(model).ids == ids
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    before = models.run(model)
    checks.randomise(adapters)
    assert not torch.allclose(models.run(model), before)


def test_split_sequences_are_refused() -> None:
    module = attention("flux double")
    module.processor._parallel_config = object()
    assert "several devices" in str(refusal(module))
