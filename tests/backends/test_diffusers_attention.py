"""diffusers' attention: with a prefix: the softmax over more keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.seams import refusal
from adapterkit.errors import AdapterKitError, IncompatibleTargetError
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models

PREFIX = ak.Prefix(length=3, init_std=1.0, targets="*")
LENGTH, TEXT = 6, 5
ATTENTIONS: dict[str, dict[str, Any]] = {
    "self": {},
    "cross": {"cross_attention_dim": models.CONTEXT},
    "group norm and residual": {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 1.7},
    "text layer norm": {"cross_attention_dim": models.CONTEXT, "cross_attention_norm": "layer_norm"},
    "text group norm": {
        "cross_attention_dim": models.CONTEXT,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 3,
    },
    "spatial norm": {"spatial_norm_dim": 32, "query_dim": 32},
    "query and key norms": {"qk_norm": "layer_norm", "bias": True, "out_dim": 12},
    "unscaled": {"scale_qk": False},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "dropout": {"dropout": 0.3},
}
PROCESSORS = pytest.mark.parametrize("processor", [AttnProcessor2_0(), AttnProcessor()], ids=["fused", "explicit"])


def attention(processor: Any, **options: Any) -> Attention:
    made = Attention(**{"query_dim": 8, "heads": 2, "dim_head": 4, **options, "processor": processor}).double()
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return made.eval()


def inputs(module: Attention, masked: bool, image: bool) -> tuple[Tensor, dict[str, Any]]:
    """Queries, and what else the module is given."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, module.query_dim, 2, 3) if image else (2, LENGTH, module.query_dim)
    cross = module.is_cross_attention
    given: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, TEXT, models.CONTEXT, generator=generator).double() if cross else None
    }
    if masked:
        keep = torch.rand(2, 1, TEXT if cross else LENGTH, generator=generator) > 0.4
        given["attention_mask"] = (1 - keep.double()) * -10000.0
    if module.spatial_norm is not None:
        given["temb"] = torch.randn(2, 32, 2, 3, generator=generator).double()
    return torch.randn(shape, generator=generator).double(), given


def reference(module: Attention, x: Tensor, given: dict[str, Any], prefix: Any, weight: float) -> Tensor:
    """Softmax attention by its definition over [prefix; tokens]; the weight multiplies the prefix's mass."""
    text = given["encoder_hidden_states"]
    text = x if text is None else text
    query, key, value = (
        layer(source).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer, source in ((module.to_q, x), (module.to_k, text), (module.to_v, text))
    )
    mask = given.get("attention_mask", torch.zeros(2, 1, text.shape[1], dtype=x.dtype))[:, None].expand(
        2, 2, LENGTH, -1
    )
    front = torch.full((2, 2, LENGTH, prefix.keys.shape[1]), weight, dtype=x.dtype).log()
    mixed = checks.soft(query, *checks.prefixed(prefix, key, value), 0.5, torch.cat([front, mask], dim=-1))
    return module.to_out[0](mixed.transpose(1, 2).flatten(2))


@PROCESSORS
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("role", ["attn", "cross"])
def test_prefix_is_softmax_over_more_keys(role: str, masked: bool, weight: float, processor: Any) -> None:
    model = models.unet(block_out_channels=(8, 8)).double()
    model.set_attn_processor(processor)
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    adapters.activate({"a": weight})
    block = model.mid_block.attentions[0].transformer_blocks[0]
    module = block.attn1 if role == "attn" else block.attn2
    module.heads = 2
    x, given = inputs(module, masked, image=False)
    prefix = adapters.modules("a")[f"{role}.kv@unet.mid.0.0"]
    assert torch.allclose(module(x, **given), reference(module, x, given, prefix, weight), rtol=0, atol=1e-10)


@PROCESSORS
def test_upcast_attention_takes_a_weighted_prefix_in_half_precision(processor: Any) -> None:
    """The weight makes a mask, which has to be of the scores' dtype."""
    model = models.unet(upcast_attention=True).to(torch.bfloat16)
    model.set_attn_processor(processor)
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters)
    full = models.denoise(model)
    adapters.activate({"a": 0.999})
    assert torch.allclose(models.denoise(model), full, atol=0.1)
    adapters.activate({"a": 1e-6})
    with adapters.disabled():
        base = models.denoise(model)
    assert torch.allclose(models.denoise(model), base, atol=0.1)


def test_prefix_leaves_the_processors_where_they_are() -> None:
    model = models.unet()
    before = [id(processor) for processor in model.attn_processors.values()]
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    models.denoise(model)
    assert [id(processor) for processor in model.attn_processors.values()] == before
    model.set_default_attn_processor()
    explicit = models.denoise(model)
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.allclose(models.denoise(model), explicit, atol=1e-5)


class Elsewhere:
    """A processor that hands its work to a kernel of another library."""

    def __call__(self, module: Attention, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


@pytest.mark.parametrize("processor", [AttnAddedKVProcessor2_0(), AttnProcessor2_0(), AttnProcessor()])
def test_processors_that_take_one_softmax_are_accepted(processor: Any) -> None:
    assert refusal(attention(processor)) is None


def test_a_processor_without_a_softmax_is_refused() -> None:
    model = models.unet()
    model.set_attn_processor(Elsewhere())
    before = checks.snapshot(model)
    with pytest.raises(AdapterKitError, match="the processor Elsewhere has no softmax over keys"):
        ak.Adapters(model).add("a", PREFIX)
    checks.assert_restored(model, before)


def test_a_processor_that_takes_several_is_an_error_under_a_prefix() -> None:
    model = models.unet()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    model.set_attention_slice(1)
    with pytest.raises(IncompatibleTargetError, match="of which the heads are not known"):
        models.denoise(model)
    with adapters.disabled():
        models.denoise(model)
