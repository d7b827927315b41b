"""UNets of diffusers and whole pipelines: where their points are, and that adapters there compute what they should."""

from __future__ import annotations

import copy
import pickle
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import nn

import adapterkit as ak
from adapterkit.backends.diffusion import UNetBackend
from adapterkit.points import AttentionLayout, InjectionPoint, Span
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models

RESNET = ["res.conv1", "res.time", "res.conv2"]
SELF = ["attn.kv", "attn", "attn.q", "attn.k", "attn.v", "attn.o"]
CROSS = ["cross.kv", "cross", "cross.q", "cross.k", "cross.v", "cross.o"]
BLOCK = [*SELF, *CROSS, "mlp", "mlp.up", "mlp.gate", "mlp.down"]

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="all", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0, targets="*")
CONFIGS = pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=["lora", "bottleneck", "prefix"])

# The shapes of the published models, from their model cards' configs.
REAL: dict[str, dict[str, Any]] = {
    "sd 1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd 2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Relatives of which at least every layer must be accounted for.
RELATIVES: dict[str, dict[str, Any]] = {
    "classes": {"num_class_embeds": 5, "time_cond_proj_dim": 6},
    "projected classes": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    "gligen": {"attention_type": "gated"},
    "pooled text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "encoder_hid_dim": 8},
    "added keys": {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "attention without text": {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    "two texts": {"dual_cross_attention": True},
    "upscaler": {
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
        "mid_block_type": None,
        "norm_num_groups": None,
        "block_out_channels": (32, 64),
        "resnet_time_scale_shift": "scale_shift",
    },
}


def points_of(model: nn.Module) -> list[InjectionPoint]:
    return UNetBackend().points(model, "unet")


def at(site: str, roles: list[str]) -> list[str]:
    return [f"{role}@unet.{site}" for role in roles]


# --- where the points are --------------------------------------------------------------------------------------------


def test_ids_of_stable_diffusion() -> None:
    def transformer(site: str) -> list[str]:
        return [*at(site, ["proj.in"]), *at(f"{site}.0", BLOCK), *at(site, ["proj.out"])]

    expected = [
        "embed.patch@unet", "embed.time@unet.1", "embed.time@unet.2",
        *transformer("down.0.0"), *at("down.0.0", RESNET), "down.conv@unet.down.0",
        *at("down.1.0", [*RESNET, "res.shortcut"]),
        *at("up.0.0", [*RESNET, "res.shortcut"]), *at("up.0.1", [*RESNET, "res.shortcut"]), "up.conv@unet.up.0",
        *transformer("up.1.0"), *transformer("up.1.1"),
        *at("up.1.0", [*RESNET, "res.shortcut"]), *at("up.1.1", [*RESNET, "res.shortcut"]),
        *transformer("mid.0"), *at("mid.0", RESNET), *at("mid.1", RESNET),
        "head@unet",
    ]  # fmt: skip
    assert [point.id for point in points_of(models.unet())] == expected


def test_ids_of_xl_go_deeper_and_embed_text() -> None:
    ids = [point.id for point in points_of(models.unet_xl())]
    assert {"embed.text@unet.1", "embed.text@unet.2", "attn.q@unet.down.2.0.1", "cross.v@unet.mid.0.1"} <= set(ids)
    assert "attn.q@unet.down.0.0.0" not in ids


@pytest.mark.parametrize(
    ("name", "count", "weights", "attentions"),
    [("sd 1.5", 378, 282, 32), ("sd 2.1", 378, 282, 32), ("sdxl", 1214, 794, 140)],
)
def test_true_shapes_on_meta(name: str, count: int, weights: int, attentions: int) -> None:
    """16 or 70 transformer blocks with 16 points each; `weights` counts modules, of which GEGLU is two points."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**REAL[name])
    start = time.perf_counter()
    points = points_of(model)
    assert time.perf_counter() - start < 5  # machines differ; what grows with the square takes minutes
    assert len(points) == len({point.id for point in points}) == count
    assert len({point.path for point in points if point.kind == "weight"}) == weights
    assert sum(point.kind == "attention" for point in points) == attentions
    assert checks.unmapped(UNetBackend(), model) == []


def test_shapes_of_stable_diffusion_1_5() -> None:
    with torch.device("meta"):
        points = {point.id: point for point in points_of(UNet2DConditionModel(**REAL["sd 1.5"]))}
    assert points["cross.k@unet.down.0.1.0"].shape == (320, 768)
    assert points["attn.kv@unet.mid.0.0"].layout == AttentionLayout(kv_heads=8, head_dim=160)
    assert points["proj.in@unet.up.3.2"].shape == (320, 320, 1, 1)
    assert points["res.shortcut@unet.up.3.0"].shape == (320, 960, 1, 1)
    assert points["mlp@unet.down.2.0.0"].shape == (1280, 1280)
    assert points["mlp.gate@unet.down.0.0.0"].span == Span(1280, 1280)
    assert points["embed.patch@unet"].shape == (320, 4, 3, 3)


@pytest.mark.parametrize("options", RELATIVES.values(), ids=RELATIVES)
def test_every_layer_of_the_relatives_is_accounted_for(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = models.unet(**options)
    points = points_of(model)
    assert checks.unmapped(UNetBackend(), model) == []
    assert len({point.id for point in points}) == len(points)


def test_the_ignore_list_gives_reasons_and_hides_nothing_of_stable_diffusion() -> None:
    assert all(UNetBackend.ignored.values())
    for model in (models.unet(), models.unet_xl()):
        mapped = {point.path for point in points_of(model) if point.kind == "weight"}
        layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
        assert mapped == layers


def test_presets_leave_both_ends_and_embeddings_alone() -> None:
    for preset in ("all", "linear", "attention"):
        roles = {point.role for point in ak.points(models.unet_xl(), preset)}
        assert roles
        assert not [role for role in roles if role.startswith(("head", "embed"))]
    assert {p.role for p in ak.points(models.unet(), "attention")} == {*SELF, *CROSS} - {"attn", "cross"}


def test_tags_select_stages_and_blocks() -> None:
    model = models.unet()
    stages = {stage: ak.points(model, f"attn.q@stage={stage}").ids for stage in ("down", "mid", "up")}
    assert stages == {
        "down": ["attn.q@unet.down.0.0.0"],
        "mid": ["attn.q@unet.mid.0.0"],
        "up": ["attn.q@unet.up.1.0.0", "attn.q@unet.up.1.1.0"],
    }
    assert ak.points(model, "res.conv1@stage=up,block=1,index>=1").ids == ["res.conv1@unet.up.1.1"]
    assert ak.points(models.unet_xl(), "attn.q@stage=down,layer=1").ids == ["attn.q@unet.down.2.0.1"]


def test_a_feed_forward_without_gate_is_one_projection() -> None:
    model = models.unet()
    for name, module in list(model.named_modules()):
        if isinstance(module, FeedForward):
            width = module.net[2].out_features
            model.get_submodule(name.rpartition(".")[0]).ff = FeedForward(width, activation_fn="gelu")
    points = points_of(model)
    assert "mlp.gate" not in {point.role for point in points}
    assert all(p.span is None and p.shape == (32, 8) for p in points if p.id == "mlp.up@unet.down.0.0.0")
    assert checks.unmapped(UNetBackend(), model) == []


def test_gate_and_value_are_told_apart() -> None:
    """Doubling the value's rows (and bias) doubles the hidden state; doubling the gate's does not."""
    model = models.unet()
    spans = {p.role: p.span for p in points_of(model) if p.id.endswith("@unet.down.0.0.0") and p.span}
    assert spans == {"mlp.up": Span(0, 32), "mlp.gate": Span(32, 32)}
    ff = model.down_blocks[0].attentions[0].transformer_blocks[0].ff
    x = torch.randn(2, 3, 8)
    before = ff.net[0](x)
    with torch.no_grad():
        ff.net[0].proj.weight[:32] *= 2
        ff.net[0].proj.bias[:32] *= 2
    assert torch.allclose(ff.net[0](x), 2 * before)


def frozen_xl() -> UNet2DConditionModel:
    """Frozen before it is looked at: torch multiplies a transposed input otherwise where the weight requires grad.

    An SDXL projection gets such an input, so its last bits depend on that flag, with or without adapterkit.
    """
    return models.unet_xl().requires_grad_(False)


# --- adapters --------------------------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize(
    "make", [models.unet, frozen_xl, partial(models.unet, num_class_embeds=5)], ids=["sd", "xl", "classes"]
)
def test_adapter_comes_acts_and_goes(make: Any, config: ak.AdapterConfig) -> None:
    model = make()
    labels = {"class_labels": torch.tensor([1, 3])} if model.config.num_class_embeds else {}
    checks.check_adapter(model, partial(models.denoise, **labels), config)


@pytest.mark.parametrize("make", [models.unet, frozen_xl], ids=["sd", "xl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_merged_equals_unmerged(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(make().to(dtype), models.denoise, tolerance)


def test_lora_on_a_convolution_is_two_convolutions() -> None:
    model = models.unet().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets="down.conv"))
    checks.randomise(adapters)
    conv, [factors] = model.down_blocks[0].downsamplers[0].conv, adapters.modules("a").values()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    small = F.conv2d(x, factors.A, stride=2, padding=1)
    delta = 2.5 * F.conv2d(small, factors.B[..., None, None])
    expected = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1) + delta
    assert torch.allclose(conv(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
def test_bottleneck_stands_between_the_sublayer_and_the_sum(form: str) -> None:
    model: Any = checks.with_unlike_norms(models.unet().double())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn cross mlp", form=form))
    checks.randomise(adapters)
    modules, block = adapters.modules("a"), model.mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 5, models.CONTEXT, dtype=torch.float64)
    sublayers = (
        ("attn", block.norm1, block.attn1),
        ("cross", block.norm2, lambda h: block.attn2(h, encoder_hidden_states=text)),
        ("mlp", block.norm3, block.ff),
    )
    y = x
    with adapters.disabled():
        for role, norm, sublayer in sublayers:
            s, module = sublayer(norm(y)), modules[f"{role}@unet.mid.0.0"]
            source = {"pfeiffer": s + y, "houlsby": s, "parallel": y, "parallel_norm": norm(y)}[form]
            y = y + s + module.up(F.relu(module.down(source)))
    assert torch.allclose(block(x, encoder_hidden_states=text), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", RELATIVES.values(), ids=RELATIVES)
def test_hidden_is_the_stream_behind_a_block_of_a_transformer(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = models.unet(**options)
    found = {point.path for point in ak.points(model) if point.role == "hidden"}
    blocks = {path for path, module in model.named_modules() if type(module) is BasicTransformerBlock}
    assert found == {path for path in blocks if ".transformers." not in path}


def test_reft_edits_what_a_block_gives() -> None:
    model: Any = models.unet().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.ReFT(rank=2, form="direft", targets="hidden@stage=mid"))
    checks.randomise(adapters)
    [module], block = adapters.modules("a").values(), model.mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 5, models.CONTEXT, dtype=torch.float64)
    with adapters.disabled():
        h = block(x, encoder_hidden_states=text)
    edit = module.first
    expected = h + F.linear(h, edit.source, edit.bias) @ edit.projection
    assert torch.allclose(block(x, encoder_hidden_states=text), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(h, expected)


@CONFIGS
def test_gradient_checkpointing_changes_no_gradient(config: ak.AdapterConfig) -> None:
    checks.check_checkpointing(models.unet(), models.denoise, lambda m: m.enable_gradient_checkpointing(), config)


def test_copies_and_pickles_act_alike() -> None:
    model = models.unet()
    adapters = ak.Adapters(model)
    for name, config in (("a", LORA), ("b", BOTTLENECK), ("c", PREFIX)):
        adapters.add(name, config)
        checks.randomise(adapters, name, scale=0.1)
    adapters.activate(["a", "b", "c"])
    expected = models.denoise(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(models.denoise(twin), expected)
        ak.Adapters(twin).detach()
    assert torch.equal(models.denoise(model), expected)
