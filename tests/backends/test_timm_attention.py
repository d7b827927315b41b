"""timm's attention: softmax over more keys with a prefix, whether the module computes it itself or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import AttentionRope
from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.timm_attention import TimmAttentionSeam
from adapterkit.errors import AdapterKitError
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models

PREFIX = ak.Prefix(length=3, init_std=1.0)

LENGTH = 5
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "wide heads": {"attn_head_dim": 6, "dim_out": 10},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"attn_mask": torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) > 0.3},
    "additive": {"attn_mask": torch.randn(1, 2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)).double()},
    "per query": {"attn_mask": torch.randn(LENGTH, 1, generator=torch.Generator().manual_seed(4)).double()},
    "causal": {"is_causal": True},
}
MASKS["boolean"]["attn_mask"][..., 0] = True  # no query may see nothing


def attention(fused: bool, **options: Any) -> Attention:
    made = Attention(models.WIDTH, num_heads=models.HEADS, **options).double()
    made.fused_attn = fused  # pyright: ignore[reportAttributeAccessIssue]
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


class OneAttention(VisionTransformer):
    """A VisionTransformer that is called like its first attention."""

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.blocks[0].attn(x, **masks)


def reference(module: Attention, x: Tensor, prefix: Any, masks: dict[str, Any], weight: float = 1.0) -> Tensor:
    """Softmax attention by its definition over [prefix; tokens]; the weight multiplies the prefix's mass."""
    heads, width = module.num_heads, module.head_dim
    query, key, value = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype)
    if masks.get("is_causal"):
        mask = torch.full_like(mask, float("-inf")).triu(1)
    elif (given := masks.get("attn_mask")) is not None:
        mask = (
            torch.zeros_like(given, dtype=x.dtype).masked_fill(~given, float("-inf"))
            if given.dtype == torch.bool
            else given
        )
    mask = mask.expand(2, heads, LENGTH, LENGTH)
    front = torch.full((2, heads, LENGTH, prefix.keys.shape[1]), weight, dtype=x.dtype).log()
    keys, values = checks.prefixed(prefix, module.k_norm(key), value)
    mixed = checks.soft(module.q_norm(query), keys, values, width**-0.5, torch.cat([front, mask], dim=-1))
    mixed = module.norm(mixed.transpose(1, 2).flatten(2))
    return module.proj(mixed * module.gate(x).sigmoid() if module.gate is not None else mixed)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_prefix_is_softmax_over_more_keys(
    options: dict[str, Any], masks: dict[str, Any], fused: bool, weight: float
) -> None:
    model = models.timm_vit(OneAttention, depth=1).double()
    model.blocks[0].attn = attention(fused, **options).eval()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    adapters.activate({"a": weight})
    x = torch.randn(2, LENGTH, models.WIDTH, dtype=torch.float64)
    [prefix] = adapters.modules("a").values()
    expected = reference(model.blocks[0].attn, x, prefix, masks, weight)
    assert torch.allclose(model(x, **masks), expected, rtol=0, atol=1e-12)


def test_causal_prefix_of_a_single_token_is_seen() -> None:
    model = models.timm_vit(OneAttention, depth=1).double()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    x = torch.randn(2, 1, models.WIDTH, dtype=torch.float64)
    assert torch.allclose(model(x, is_causal=True), model(x), rtol=0, atol=1e-12)


class Renamed(Attention):
    """Another name, the same forward."""


class Changed(Attention):
    """The same name is no guarantee either."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "module", [AttentionRope(8, num_heads=2), DiffAttention(8, num_heads=2), Changed(8, num_heads=2)]
)
def test_other_attentions_are_refused(module: nn.Module) -> None:
    refusal = TimmAttentionSeam().refusal(module)
    assert refusal is not None
    assert type(module).__name__ in refusal
    assert "timm.layers.attention" in refusal


def test_plain_attentions_are_accepted() -> None:
    assert TimmAttentionSeam().refusal(Attention(8, num_heads=2)) is None
    assert TimmAttentionSeam().refusal(Renamed(8, num_heads=2)) is None


def test_a_second_prefix_joins_the_first() -> None:
    model = models.timm_vit()
    adapters = ak.Adapters(model)
    for name in ("a", "b"):
        adapters.add(name, PREFIX)
        checks.randomise(adapters, name)
    with adapters.activated("a"):
        alone = model(models.images())
    adapters.activate(["a", "b"])
    assert not torch.allclose(model(models.images()), alone)


def test_prefix_on_a_refused_attention_is_an_error() -> None:
    model = models.timm_vit(attn_layer="diff")
    before, base = checks.snapshot(model), model(models.images())
    with pytest.raises(AdapterKitError, match="DiffAttention"):
        ak.Adapters(model).add("a", PREFIX)
    checks.assert_restored(model, before)
    assert torch.equal(model(models.images()), base)
