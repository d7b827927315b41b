"""CLIP's text encoders in both layouts of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import adapterkit as ak
from adapterkit.backends.clip import ClipTextBackend
from tests.backends.language_models import shake, unmapped

WIDTH, LAYERS, HEADS = 32, 2, 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}
BLOCK = ["attn.kv", "attn.k", "attn.v", "attn.q", "attn.o", "attn", "mlp.up", "mlp.down", "mlp"]
TYPES = {
    "lora": ak.LoRA(rank=4, targets="*"),
    "bottleneck": ak.Bottleneck(width=5, targets="attn mlp"),
    "prefix": ak.Prefix(length=3, init_std=1.0),
}


class TextTransformer4(nn.Module):
    """The names that transformers 4 gives the inside of its CLIPTextModel."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.final_layer_norm = model.embeddings, model.encoder, model.final_layer_norm


class TextModel4(nn.Module):
    """CLIPTextModel as transformers 4 names it; with a projection it is CLIPTextModelWithProjection."""

    def __init__(self, model: CLIPTextModel, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.text_model = TextTransformer4(model)
        if projection is not None:
            self.text_projection = projection


def build(cls: Any = CLIPTextModel, **options: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=12,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=16,
        initializer_factor=8.0,
        eos_token_id=39,
        bos_token_id=1,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(2)
    return cls(config).double().eval()


def tokens() -> Tensor:
    ids = torch.randint(2, 39, (2, 9), generator=torch.Generator().manual_seed(4))
    ids[:, -1] = 39
    return ids


def hidden(model: Any, **inputs: Any) -> Tensor:
    return model(tokens(), **inputs).last_hidden_state


def expected_ids(projection: bool) -> list[str]:
    stem = ["embed.tokens@text_encoder", "tokens@text_encoder", "embed.pos@text_encoder"]
    blocks = [f"{role}@text_encoder.{layer}" for layer in range(LAYERS) for role in BLOCK]
    return stem + blocks + (["head@text_encoder"] if projection else [])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layout", [4, 5])
def test_both_layouts_have_the_same_ids(projection: bool, layout: int) -> None:
    model = build(CLIPTextModelWithProjection if projection else CLIPTextModel)
    if layout == 4:
        inner = model.text_model if projection else model
        model = TextModel4(inner, model.text_projection if projection else None)
    points = ClipTextBackend().points(model, "text_encoder")
    assert [p.id for p in points] == expected_ids(projection)
    assert unmapped(model, points, ClipTextBackend.ignored) == []
    assert all(isinstance(model.get_submodule(p.path), nn.Module) for p in points)


def test_presets_keep_out_of_embeddings_and_projection() -> None:
    roles = {p.role for p in ak.points(build(CLIPTextModelWithProjection), "linear")}
    assert roles == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_trains_and_detaches(kind: str) -> None:
    model = build()
    before, config = hidden(model), model.config
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES[kind])
    shake(adapters)
    after = hidden(model)
    assert (after - before).abs().max() > 1e-2
    after.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters("a"))
    with adapters.disabled():
        assert torch.equal(hidden(model), before)
    adapters.detach()
    assert torch.equal(hidden(model), before)
    assert all(layer.self_attn.config is config for layer in model.encoder.layers)


def test_merged_equals_unmerged() -> None:
    model = build()
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES["lora"])
    shake(adapters, scale=0.1)
    active = hidden(model)
    with adapters.merged():
        torch.testing.assert_close(hidden(model), active, **EXACT)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_is_softmax_over_prefix_and_earlier_tokens(attention: str) -> None:
    """CLIP's modules say that they are not causal; the encoder says at each call that they are."""
    model = build(attn_implementation=attention)
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES["prefix"])
    shake(adapters)
    module, prefix = model.encoder.layers[1].self_attn, adapters.modules("a")["attn.kv@text_encoder.1"]
    seen: dict[str, Tensor] = {}
    module.register_forward_pre_hook(lambda _, a, k: seen.update(x=(*a, *k.values())[0]), with_kwargs=True)
    module.out_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    hidden(model)
    q, k, v = (
        layer(seen["x"]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    keys, values = (torch.cat([p.expand(2, -1, -1, -1), t], 2) for p, t in ((prefix.keys, k), (prefix.values, v)))
    hides = torch.cat([torch.zeros(9, 3), torch.ones(9, 9).triu(1)], dim=1).bool()
    scores = (q @ keys.mT / (WIDTH // HEADS) ** 0.5).masked_fill(hides, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    bound = EXACT if attention == "sdpa" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(seen["mixed"], expected, **bound)


def test_padding_changes_nothing_for_the_tokens_before_it() -> None:
    model = build()
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES["prefix"])
    shake(adapters)
    mask = torch.ones_like(tokens())
    mask[0, -3:] = 0
    torch.testing.assert_close(hidden(model, attention_mask=mask)[0, :-3], hidden(model)[0, :-3], **EXACT)
    assert (hidden(model, attention_mask=mask)[0, -1] - hidden(model)[0, -1]).abs().max() > 1e-3
