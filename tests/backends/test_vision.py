"""Vision transformers: where their points are, and that adapters there compute what their equations say."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, GluMlp, SwiGLU, SwiGLUPacked
from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

import adapterkit as ak
from adapterkit.adapter import Base
from adapterkit.backends.timm_attention import TimmAttentionSeam, attend
from adapterkit.backends.vision import TimmViTBackend, ViTBackend
from adapterkit.errors import AdapterKitError
from adapterkit.points import InjectionPoint, Kind, Span
from tests.backends import vision_checks as checks
from tests.backends import vision_models as models


class GatedAttention(Attention):
    """timm's attention with the option that its VisionTransformer does not pass on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, gated=True)


TIMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "every norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5, "pre_norm": True},
    "dynamic size": {"dynamic_img_size": True, "no_embed_class": True, "reg_tokens": 2},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "map pooling": {"class_token": False, "global_pool": "map"},
    "no position": {"pos_embed": "none"},
    "drop": {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1},
    "distilled": {"cls": VisionTransformerDistilled},
    "gated value first": {"mlp_layer": GluMlp},
    "gated gate first": {"mlp_layer": SwiGLUPacked},
    "gated split": {"mlp_layer": SwiGLU},
    "gated attention": {"attn_layer": GatedAttention},
    "differential attention": {"attn_layer": "diff"},
    "post-norm": {"block_fn": ResPostBlock},
    "parallel sublayers": {"block_fn": ParallelScalingBlock},
    "parallel sublayers, fused": {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)},
    "parallel branches": {"block_fn": ParallelThingsBlock},
}
WITHOUT_OUTPUTS = ("post-norm",)
WITHOUT_PREFIX = ("differential attention", "parallel sublayers", "parallel sublayers, fused")

BLOCK = ["attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "attn", "mlp.up", "mlp.down", "mlp"]
HF_BLOCK = ["attn", "attn.kv", "attn.q", "attn.k", "attn.v", "attn.o", "mlp", "mlp.up", "mlp.down"]


def classify(model: nn.Module) -> Tensor:
    """The scores of fixed images; of transformers' models whatever comes first."""
    made = model(models.images(dtype=next(model.parameters()).dtype))
    return made if isinstance(made, Tensor) else made[0]


def vit(cls: type = ViTForImageClassification, **options: Any) -> Any:
    return cls(models.vit_config(num_labels=models.CLASSES, **options)).eval()


def ids_of(backend: Any, model: nn.Module) -> list[str]:
    return [point.id for point in backend.points(model, "vision")]


# --- where the points are --------------------------------------------------------------------------------------------


def in_layers(roles: list[str], layers: int = models.LAYERS) -> list[str]:
    return [f"{role}@vision.{layer}" for layer in range(layers) for role in roles]


def test_ids_of_timm() -> None:
    expected = ["embed.patch@vision", "tokens@vision", *in_layers(BLOCK), "head@vision"]
    assert ids_of(TimmViTBackend(), models.timm_vit()) == expected
    assert ids_of(TimmViTBackend(), models.timm_vit(VisionTransformerDistilled)) == [*expected, "head@vision.dist"]


def test_ids_of_parallel_branches() -> None:
    attention = [f"{role}@vision.0.{branch}" for branch in (0, 1) for role in BLOCK[:6]]
    feed_forward = [f"{role}@vision.0.{branch}" for branch in (0, 1) for role in BLOCK[6:]]
    model = models.timm_vit(depth=1, block_fn=ParallelThingsBlock)
    assert ids_of(TimmViTBackend(), model)[2:-1] == [*attention, *feed_forward]


def test_ids_of_parallel_sublayers() -> None:
    model = models.timm_vit(depth=1, block_fn=ParallelScalingBlock)
    expected = ["mlp.up", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.down", "block"]
    assert ids_of(TimmViTBackend(), model)[2:-1] == in_layers(expected, 1)
    spans = {p.role: p.span for p in TimmViTBackend().points(model, "vision") if p.span}
    up = 4 * models.WIDTH
    assert spans == {"mlp.up": Span(0, up), "attn.q": Span(up, 8), "attn.k": Span(up + 8, 8), "attn.v": Span(up + 16, 8)}


def test_ids_of_vit() -> None:
    stem = ["tokens@vision", "embed.patch@vision"]
    assert ids_of(ViTBackend(), vit()) == [*stem, *in_layers(HF_BLOCK), "head@vision"]
    assert ids_of(ViTBackend(), vit(ViTModel)) == [*stem, *in_layers(HF_BLOCK), "head.pooler@vision"]
    assert ids_of(ViTBackend(), vit(ViTForMaskedImageModeling, encoder_stride=4)) == [*stem, *in_layers(HF_BLOCK), "head@vision"]


def test_ids_of_vit_in_transformers_4() -> None:
    new = vit()
    old = models.OldViT(new)
    assert torch.allclose(classify(old), classify(new), atol=1e-6)
    points = {p.id: p for p in ViTBackend().points(old, "vision")}
    same = {p.id: p for p in ViTBackend().points(new, "vision")}
    assert set(points) == set(same)
    assert {key: (p.shape, p.tags, p.kind) for key, p in points.items()} == {
        key: (p.shape, p.tags, p.kind) for key, p in same.items()
    }
    assert points["attn.kv@vision.1"].path == "vit.encoder.layer.1.attention.attention"
    for key in points:
        if points[key].kind == "weight":
            assert old.get_submodule(points[key].path) is new.get_submodule(same[key].path)


def test_adapters_move_between_the_layouts_of_transformers() -> None:
    new = vit()
    old = models.OldViT(copy.deepcopy(new))
    config = ak.Bottleneck(width=3, targets="attn mlp")
    outputs = []
    for model in (new, old):
        adapters = ak.Adapters(model, backend="vit")
        adapters.add("a", config)
        randomised_by_id(adapters)
        outputs.append(classify(model))
    assert torch.allclose(*outputs, atol=1e-6)


def randomised_by_id(adapters: ak.Adapters) -> None:
    with torch.no_grad():
        for index, (_, tensor) in enumerate(sorted(adapters.state_dict("a").items())):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_every_layer_of_timm_is_mapped(options: dict[str, Any]) -> None:
    model = models.timm_vit(**options)
    points = TimmViTBackend().points(model, "vision")
    assert checks.unmapped(TimmViTBackend(), model) == []
    assert len({p.id for p in points}) == len(points)
    order = [name for name, _ in model.named_modules()]
    assert [order.index(p.path) for p in points] == sorted(order.index(p.path) for p in points)


@pytest.mark.parametrize("cls", [ViTModel, ViTForImageClassification, ViTForMaskedImageModeling])
def test_every_layer_of_vit_is_mapped(cls: type) -> None:
    assert checks.unmapped(ViTBackend(), vit(cls, encoder_stride=4)) == []


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_so400m_patch14_siglip_224", "deit3_small_patch16_224"])
def test_real_models_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    start = time.perf_counter()
    points = TimmViTBackend().points(model, "vision")
    assert time.perf_counter() - start < 1
    assert len({p.id for p in points}) == len(points) > 9 * len(model.blocks)
    assert checks.unmapped(TimmViTBackend(), model) == []


def test_hybrid_convolutions_are_ignored_for_a_reason() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_r_s16_p8_224")
    assert checks.unmapped(TimmViTBackend(), model) == []
    paths = [p.path for p in TimmViTBackend().points(model, "vision")]
    assert "patch_embed.proj" in paths
    assert not [path for path in paths if path.startswith("patch_embed.backbone")]
    assert all(TimmViTBackend.ignored.values())


def test_presets_leave_head_and_embeddings_alone() -> None:
    for model in (models.timm_vit(global_pool="map"), vit(ViTModel)):
        for preset in ("all", "linear", "attention"):
            chosen = ak.points(model, preset)
            assert len(chosen) > 0
            assert not [p.id for p in chosen if p.role.startswith(("head", "embed"))]


def test_tags_select_layers() -> None:
    assert ak.points(models.timm_vit(), "attn.{q,v}@layer>=1").ids == ["attn.q@vision.1", "attn.v@vision.1"]


@pytest.mark.parametrize(("layer", "first"), [(GluMlp, "mlp.up"), (SwiGLUPacked, "mlp.gate")])
def test_gate_and_value_are_told_apart(layer: Any, first: str) -> None:
    """The value's rows scale the hidden state: doubling them (with their bias) doubles it; doubling the gate's does not."""
    model = models.timm_vit(depth=1, mlp_layer=layer)
    spans = {p.role: p.span for p in TimmViTBackend().points(model, "vision") if p.role in ("mlp.up", "mlp.gate")}
    assert spans[first] == Span(0, 2 * models.WIDTH)
    mlp = model.blocks[0].mlp
    seen: list[Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(models.images())
    rows = slice(spans["mlp.up"].start, spans["mlp.up"].start + spans["mlp.up"].size)
    with torch.no_grad():
        mlp.fc1.weight[rows] *= 2
        mlp.fc1.bias[rows] *= 2
    model(models.images())
    assert torch.allclose(seen[1], 2 * seen[0])


# --- adapters --------------------------------------------------------------------------------------------------------

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="*", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0)


def configs(name: str) -> list[ak.AdapterConfig]:
    found: list[ak.AdapterConfig] = [LORA]
    found += [] if name in WITHOUT_OUTPUTS else [BOTTLENECK]
    return found + ([] if name in WITHOUT_PREFIX else [PREFIX])


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name in TIMM for config in configs(name)], ids=lambda v: getattr(type(v), "__name__", v) if not isinstance(v, str) else v
)
def test_timm_adapter_comes_acts_and_goes(name: str, config: ak.AdapterConfig) -> None:
    checks.check_adapter(models.timm_vit(**TIMM[name]), classify, config)


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("cls", [ViTForImageClassification, ViTModel])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vit_adapter_comes_acts_and_goes(cls: type, config: ak.AdapterConfig, implementation: str) -> None:
    model = vit(cls, attn_implementation=implementation)
    # The pooler is no part of the first output.
    checks.check_adapter(model, classify, config, silent=("head_pooler.a.A", "head_pooler.a.B"))


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_timm_merged_equals_unmerged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(models.timm_vit(**TIMM[name]).to(dtype), classify, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_vit_merged_equals_unmerged(dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(vit().to(dtype), classify, tolerance)


def test_lora_on_q_and_v_is_a_sum_on_their_rows() -> None:
    model = models.timm_vit().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets="attn.{q,v}"))
    checks.randomise(adapters)
    qkv, modules, d = model.blocks[1].attn.qkv, adapters.modules("a"), models.WIDTH
    x = torch.randn(2, 5, d, dtype=torch.float64)
    expected = F.linear(x, qkv.weight, qkv.bias)
    for start, role in ((0, "attn.q"), (2 * d, "attn.v")):
        factors = modules[f"{role}@vision.1"]
        expected[..., start : start + d] += x @ factors.A.T @ factors.B.T * 2.5
    assert torch.allclose(qkv(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(qkv(x)[..., d : 2 * d], F.linear(x, qkv.weight, qkv.bias)[..., d : 2 * d])


def bottleneck(module: Any, h: Tensor) -> Tensor:
    return module.up(F.relu(module.down(h)))


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
def test_bottleneck_stands_between_the_sublayer_and_the_sum(form: str) -> None:
    """With layer scale: what is adapted is the scaled output, the last thing before the residual sum."""
    model = models.timm_vit(init_values=0.5).double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp", form=form))
    checks.randomise(adapters)
    modules, block = adapters.modules("a"), model.blocks[0]
    x = torch.randn(2, 5, models.WIDTH, dtype=torch.float64)
    with adapters.disabled():
        y = x
        for role, norm, sublayer, scale in (("attn", block.norm1, block.attn, block.ls1), ("mlp", block.norm2, block.mlp, block.ls2)):
            s = scale(sublayer(norm(y)))
            source = {"pfeiffer": s + y, "houlsby": s, "parallel": y, "parallel_norm": norm(y)}[form]
            y = y + s + bottleneck(modules[f"{role}@vision.0"], source)
    assert torch.allclose(block(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["pfeiffer", "parallel_norm"])
def test_bottleneck_of_vit_stands_between_the_sublayer_and_the_sum(form: str) -> None:
    model = vit().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp", form=form))
    checks.randomise(adapters)
    modules, block = adapters.modules("a"), model.vit.layers[0]
    x = torch.randn(2, 5, models.WIDTH, dtype=torch.float64)
    with adapters.disabled():
        s = block.attention(block.layernorm_before(x))[0]
        source = s + x if form == "pfeiffer" else block.layernorm_before(x)
        y = x + s + bottleneck(modules["attn@vision.0"], source)
        s = block.mlp(block.layernorm_after(y))
        source = s + y if form == "pfeiffer" else block.layernorm_after(y)
        y = y + s + bottleneck(modules["mlp@vision.0"], source)
    assert torch.allclose(block(x), y, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Register(ak.AdapterConfig):
    """Learnt tokens behind the embedded sequence: what the `tokens` kind is for."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    targets: str = "tokens"
    count: int = 2

    def build(self, point: InjectionPoint) -> RegisterModule:
        return RegisterModule(self.count, point.out_features)


class RegisterModule(ak.AdapterModule):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return torch.cat([y, self.rows.expand(y.shape[0], -1, -1)], dim=1)


@pytest.mark.parametrize("make", [models.timm_vit, partial(models.timm_vit, pos_embed="none", pre_norm=True), vit])
def test_the_embedded_sequence_can_be_extended(make: Any) -> None:
    model = make()
    core = model.vit if hasattr(model, "vit") else model
    adapters = ak.Adapters(model)
    adapters.add("a", Register())
    extended = classify(model)
    [module] = adapters.modules("a").values()
    lengths: list[int] = []
    first = (core.layers if hasattr(core, "layers") else core.blocks)[0]
    hook = first.register_forward_pre_hook(lambda _, args: (lengths.append(args[0].shape[1]), by_hand(args, module.rows))[1])
    with adapters.disabled():
        assert torch.allclose(classify(model), extended, atol=1e-6)
    hook.remove()
    assert lengths == [(models.IMAGE // models.PATCH) ** 2 + 1]


def by_hand(args: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    x, *rest = args
    return (torch.cat([x, rows.expand(x.shape[0], -1, -1)], dim=1), *rest)


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=lambda c: type(c).__name__)
def test_gradient_checkpointing_changes_no_gradient(config: ak.AdapterConfig) -> None:
    checks.check_checkpointing(models.timm_vit(), classify, lambda m: m.set_grad_checkpointing(True), config)
    checks.check_checkpointing(vit(), classify, lambda m: m.activation_checkpointing_enable(), config)


@pytest.mark.parametrize("make", [models.timm_vit, vit])
def test_copies_and_pickles_act_alike(make: Any) -> None:
    model = make()
    adapters = ak.Adapters(model)
    for name, config in (("a", LORA), ("b", BOTTLENECK), ("c", PREFIX)):
        adapters.add(name, config)
        checks.randomise(adapters, name)
    adapters.activate(["a", "b", "c"])
    expected = classify(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(classify(twin), expected)
        ak.Adapters(twin).detach()
    assert torch.equal(classify(model), expected)


# --- timm's attention ------------------------------------------------------------------------------------------------

LENGTH = 5
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "wide heads": {"attn_head_dim": 6, "dim_out": 10},
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
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


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_without_adapters_is_timms(options: dict[str, Any], masks: dict[str, Any], fused: bool) -> None:
    module = attention(fused, **options)
    x = torch.randn(2, LENGTH, models.WIDTH, dtype=torch.float64)
    for training in (False, True):
        module.train(training)
        torch.manual_seed(1)
        expected = module(x, **masks)
        torch.manual_seed(1)
        assert torch.equal(attend(module, x, **masks), expected)


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
        mask = torch.zeros_like(given, dtype=x.dtype).masked_fill(~given, float("-inf")) if given.dtype == torch.bool else given
    mask = mask.expand(2, heads, LENGTH, LENGTH)
    front = torch.full((2, heads, LENGTH, prefix.keys.shape[1]), weight, dtype=x.dtype).log()
    keys, values = checks.prefixed(prefix, module.k_norm(key), value)
    mixed = checks.soft(module.q_norm(query), keys, values, width**-0.5, torch.cat([front, mask], dim=-1))
    mixed = module.norm(mixed.transpose(1, 2).flatten(2))
    return module.proj(mixed * module.gate(x).sigmoid() if module.gate is not None else mixed)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [*ATTENTIONS.values()][:4], ids=[*ATTENTIONS][:4])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_prefix_is_softmax_over_more_keys(options: dict[str, Any], masks: dict[str, Any], fused: bool, weight: float) -> None:
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


def test_prefix_of_vit_is_softmax_over_more_keys() -> None:
    model = vit(num_attention_heads=2).double()
    adapters = ak.Adapters(model)
    adapters.add("a", PREFIX)
    checks.randomise(adapters, scale=1.0)
    module = model.vit.layers[0].attention
    prefix = adapters.modules("a")["attn.kv@vision.0"]
    x = torch.randn(2, LENGTH, models.WIDTH, dtype=torch.float64)
    query, key, value = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (module.q_proj, module.k_proj, module.v_proj))
    mixed = checks.soft(query, *checks.prefixed(prefix, key, value), 0.5)
    assert torch.allclose(module(x)[0], module.o_proj(mixed.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


class Renamed(Attention):
    """Another name, the same forward."""


class Changed(Attention):
    """The same name is no guarantee either."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("module", [AttentionRope(8, num_heads=2), DiffAttention(8, num_heads=2), Changed(8, num_heads=2)])
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
        alone = classify(model)
    adapters.activate(["a", "b"])
    assert not torch.allclose(classify(model), alone)


def test_prefix_on_a_refused_attention_is_an_error() -> None:
    model = models.timm_vit(attn_layer="diff")
    before, base = checks.snapshot(model), classify(model)
    with pytest.raises(AdapterKitError, match="DiffAttention"):
        ak.Adapters(model).add("a", PREFIX)
    checks.assert_restored(model, before)
    assert torch.equal(classify(model), base)
