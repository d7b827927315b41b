"""Vision families beside ViT: where their points are, and that adapters come, act, merge and go."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterKitError
from adapterkit.mapping.model import map_model
from adapterkit.points import WeightLayout
from tests.backends import vision_checks as checks
from tests.backends import vision_families as families
from tests.backends.own import own

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="all", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0)

ATTENTION = "attn.kv attn.q attn.k attn.v attn.o attn"
UP_DOWN = "mlp.up mlp.down mlp"
GATED = "mlp.gate mlp.up mlp.down mlp"
CLIP_BLOCK = f"attn.kv attn.k attn.v attn.q attn.o attn {UP_DOWN}"

# What is in front of the blocks; what is in each block; what is behind them.
IDS: dict[str, tuple[str, str, str]] = {
    "timm eva": ("embed.patch tokens", f"{ATTENTION} {UP_DOWN}", "head"),
    "timm eva02": ("embed.patch tokens", f"{ATTENTION} {GATED}", "head"),
    "timm eva packed": ("embed.patch tokens", f"{ATTENTION} {GATED}", "head"),
    "timm eva grouped": ("embed.patch tokens", f"{ATTENTION} {UP_DOWN}", "head"),
    "timm eva post-norm": ("embed.patch tokens", f"{ATTENTION} {UP_DOWN}", "head"),
    "timm dinov3": ("embed.patch tokens", f"{ATTENTION} {UP_DOWN}", "head"),
    "timm beit": ("embed.patch tokens", f"{ATTENTION} {UP_DOWN}", "head"),
    "timm beit v2": ("embed.patch tokens", f"{ATTENTION} {GATED}", "head"),
    "dinov2": ("tokens embed.patch", f"{ATTENTION} {UP_DOWN}", "head"),
    "dinov2 gated": ("tokens embed.patch", f"{ATTENTION} {GATED}", ""),
    "dinov2 registers": ("tokens embed.patch", f"{ATTENTION} {UP_DOWN}", ""),
    "dinov3": ("tokens embed.patch", CLIP_BLOCK, ""),
    "dinov3 gated": ("tokens embed.patch", CLIP_BLOCK.replace("mlp.up", "mlp.gate mlp.up"), ""),
    "beit": ("tokens embed.patch", "attn.kv attn attn.q attn.k attn.v attn.o mlp mlp.up mlp.down", "head"),
    "clip": ("embed.patch embed.pos tokens", CLIP_BLOCK, "head"),
    "siglip": ("tokens embed.patch embed.pos", CLIP_BLOCK, "head.up head.down"),
    "siglip text": ("embed.tokens tokens embed.pos", CLIP_BLOCK, "head"),
}
STAGED_IDS: dict[str, str] = {
    "timm swin": "embed.patch {0.0} {0.1} down.proj.1 {1.0} head",
    "timm swin v2": "embed.patch {0.0} {0.1} down.proj.1 {1.0} head",
    "swin": "embed.patch {0.0} {0.1} down.proj.0 {1.0} head",
    "timm convnext": "embed.patch.0 {0.0} down.conv.1 {1.0} down.conv.2 {2.0} down.conv.3 {3.0} head",
    "timm convnext v2": (
        "embed.patch.0 embed.patch.1 {0.0} down.conv.1 {1.0} down.conv.2 {2.0} down.conv.3 {3.0} head.hidden head"
    ),
}
STAGED_BLOCKS = {
    "timm swin": f"{ATTENTION} {UP_DOWN}",
    "timm swin v2": f"attn.q attn.k attn.v attn.o attn {UP_DOWN}",
    "swin": "attn.kv attn.q attn.k attn.v attn.o mlp mlp.up mlp.down attn",
    "timm convnext": "res.conv1 mlp.up mlp.down",
    "timm convnext v2": "res.conv1 mlp.up mlp.down",
}


def ids(model: nn.Module) -> list[str]:
    """Role and site of every point, without the component, which is the same for all."""
    points = own(ak.points(model))
    return [p.id.replace(f"@{p.component}", "") for p in points]


def expand(template: str, block: str) -> list[str]:
    found: list[str] = []
    for word in template.split():
        site = word[1:-1]
        found += [f"{role}.{site}" for role in block.split()] if word.startswith("{") else [word]
    return found


@pytest.mark.parametrize("name", IDS)
def test_ids(name: str) -> None:
    front, block, behind = IDS[name]
    assert ids(families.build(name)) == expand(f"{front} {{0}} {{1}} {behind}", block)


@pytest.mark.parametrize("name", STAGED_IDS)
def test_ids_with_stages(name: str) -> None:
    assert ids(families.build(name)) == expand(STAGED_IDS[name], STAGED_BLOCKS[name])


def test_ids_of_hiera() -> None:
    plain, pooled = f"{ATTENTION} {UP_DOWN}", f"res.shortcut attn.kv attn.q attn.k attn.v attn.o {UP_DOWN}"
    blocks = [*expand("embed.patch {0}", plain), *expand("{1}", pooled), *expand("{2}", plain), *expand("{3}", pooled)]
    assert ids(families.build("timm hiera")) == [*blocks, "head"]


def test_ids_of_caformer() -> None:
    convolutions, attention = "res.conv1 res.conv2 res.conv3 mlp.up mlp.down", f"{ATTENTION} {UP_DOWN}"
    front = [*expand("embed.patch {0.0} down.conv.1 {1.0}", convolutions)]
    behind = expand("down.conv.2 {2.0} down.conv.3 {3.0} head.hidden head", attention)
    assert ids(families.build("timm caformer")) == [*front, *behind]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_layer_is_mapped_or_ignored_for_a_reason(name: str) -> None:
    model = families.build(name)
    [component] = map_model(model).components.values()
    points = component.backend.points(model, "x")
    assert len({p.id for p in points}) == len(points)
    ignored: dict[str, str] = component.backend.ignored  # type: ignore[attr-defined]
    mapped = {p.path for p in points if p.kind == "weight"}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, kinds)]
    assert [x for x in layers if x not in mapped and not any(fnmatchcase(x, glob) for glob in ignored)] == []
    assert all(ignored.values())


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_base_patch14_dinov2",
        "vit_base_patch16_siglip_224",
        "beitv2_base_patch16_224",
        "eva02_base_patch14_224",
        "vit_small_patch16_dinov3",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "convnext_tiny",
        "hiera_tiny_224",
        "caformer_s18",
        "poolformer_s12",
    ],
)
def test_registered_models_are_mapped_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    [component] = map_model(model).components.values()
    assert checks.unmapped(component.backend, model) == []
    chosen = ak.points(model, "all")
    assert len(chosen) > 25
    assert not [p.id for p in chosen if p.role.startswith(("head", "embed"))]


@pytest.mark.parametrize(
    ("name", "read"),
    [("timm eva", True), ("timm eva packed", False), ("timm beit", True), ("timm swin v2", True)],
)
def test_projections_whose_weight_is_read_say_so(name: str, read: bool) -> None:
    points = [p for p in ak.points(families.build(name), "attn.{q,k,v}") if isinstance(p.layout, WeightLayout)]
    assert {(p.layout.access, p.layout.bias) for p in points} == {("read" if read else "call", False)}  # type: ignore[union-attr]


def cases() -> list[tuple[str, ak.AdapterConfig]]:
    without = {id(BOTTLENECK): families.WITHOUT_OUTPUTS, id(PREFIX): families.WITHOUT_PREFIX, id(LORA): ()}
    return [(n, c) for n in families.FAMILIES for c in (LORA, BOTTLENECK, PREFIX) if n not in without[id(c)]]


@pytest.mark.parametrize(("name", "config"), cases(), ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_an_adapter_comes_acts_and_goes(name: str, config: ak.AdapterConfig) -> None:
    checks.check_adapter(families.build(name), families.see, config)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_merged_equals_unmerged(name: str) -> None:
    checks.check_merge(families.build(name, torch.float64), families.see, 1e-10)


@pytest.mark.parametrize("name", ["timm eva", "timm hiera", "dinov3", "swin"])
def test_merged_equals_unmerged_in_single_precision(name: str) -> None:
    checks.check_merge(families.build(name), families.see, 1e-5)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_saved_adapter_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, twin = families.build(name), families.build(name)
    adapters, others = ak.Adapters(model), ak.Adapters(twin)
    adapters.add("a", LORA)
    checks.randomise(adapters)
    adapters.save("a", tmp_path / "a.safetensors")
    others.load(tmp_path / "a.safetensors", "a")
    others.activate("a")
    adapters.freeze("a")  # torch has other kernels for what is trained
    with torch.no_grad():
        assert torch.equal(families.see(twin), families.see(model))


@pytest.mark.parametrize("name", ["timm eva", "timm eva post-norm", "timm beit", "timm swin", "timm swin v2"])
def test_lora_on_q_and_v_is_a_sum_on_their_rows(name: str) -> None:
    """Called or read, the model must compute with weights whose rows have the product of the factors added."""
    model, twin = families.build(name, torch.float64), families.build(name, torch.float64)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets="attn.{q,v}"))
    checks.randomise(adapters)
    points = {p.id: p for p in ak.points(model, "attn.{q,v}")}
    assert {p.role: p.span.start // p.span.size for p in points.values() if p.span} == {"attn.q": 0, "attn.v": 2}
    for key, factors in adapters.modules("a").items():
        weight, span = twin.get_submodule(points[key].path).weight, points[key].span
        weight[span.start : span.start + span.size] += 2.5 * factors.B @ factors.A  # type: ignore[union-attr,operator]
    torch.testing.assert_close(families.see(model), families.see(twin), rtol=1e-10, atol=1e-10)
    adapters.detach()
    assert not torch.allclose(families.see(model), families.see(twin), atol=1e-3)


def test_gate_and_value_of_packed_weights_are_told_apart() -> None:
    """Doubling the value's rows doubles what goes into the last projection, unlike the gate's."""
    model = families.build("timm eva packed", torch.float64)
    span = next(p.span for p in ak.points(model, "mlp.up@layer=0"))
    mlp: Any = model.blocks[0].mlp
    x = torch.randn(2, 5, families.WIDTH, dtype=torch.float64)
    seen: list[Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mlp(x)
    for parameter in (mlp.fc1.weight, mlp.fc1.bias):
        parameter[span.start : span.start + span.size] *= 2  # type: ignore[union-attr]
    mlp(x)
    assert torch.allclose(seen[1], 2 * seen[0])


def bottleneck(module: Any, h: Tensor) -> Tensor:
    return module.up(F.relu(module.down(h)))


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
@pytest.mark.parametrize("name", ["timm swin v2", "timm eva post-norm"])
def test_bottlenecks_stand_behind_a_norm_of_the_sublayer(name: str, form: str) -> None:
    """x + norm(sublayer(x)), where nothing stands between the stream and the sublayer."""
    model = families.build(name, torch.float64)
    swin = name == "timm swin v2"
    block: Any = model.layers[0].blocks[1] if swin else model.blocks[1]
    attention = block._attn if swin else block.attn
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp", form=form))
    checks.randomise(adapters)
    modules, site = adapters.modules("a"), "0.1" if swin else "1"
    x = torch.randn(2, *([8, 8] if swin else [5]), families.WIDTH, dtype=torch.float64)
    with adapters.disabled():
        y = x
        for role, norm, sublayer in (("attn", block.norm1, attention), ("mlp", block.norm2, block.mlp)):
            s = norm(sublayer(y))
            source = {"pfeiffer": s + y, "houlsby": s, "parallel": y, "parallel_norm": y}[form]
            y = y + s + bottleneck(modules[f"{role}@vision.{site}"], source)
    assert torch.allclose(block(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "prefix", "norms", "scales"),
    [
        ("timm eva", "blocks.0", ("norm1", "norm2"), ("gamma_1", "gamma_2")),
        ("dinov2", "dinov2.encoder.layer.0", ("norm1", "norm2"), ("layer_scale1", "layer_scale2")),
        ("clip", "vision_model.encoder.layers.0", ("layer_norm1", "layer_norm2"), ("", "")),
    ],
)
def test_bottlenecks_stand_between_the_scaled_sublayer_and_the_sum(
    name: str, prefix: str, norms: tuple[str, str], scales: tuple[str, str]
) -> None:
    model = families.build(name, torch.float64)
    block: Any = model.get_submodule(prefix)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Bottleneck(width=3, targets="attn mlp"))
    checks.randomise(adapters)
    modules = adapters.modules("a")
    x = torch.randn(2, 5, families.WIDTH, dtype=torch.float64)
    attention = next(m for n, m in block.named_children() if n in ("attn", "attention", "self_attn"))
    # transformers 5 hands the mask on by name; the rest of a block takes the stream alone
    run = (lambda h: block(h, attention_mask=None)) if name == "clip" else block
    with adapters.disabled():
        y = x
        for role, sublayer, norm, scale in zip(("attn", "mlp"), (attention, block.mlp), norms, scales, strict=True):
            s = sublayer(getattr(block, norm)(y))
            s = s[0] if isinstance(s, tuple) else s
            if scale:
                factor = getattr(block, scale)
                s = factor(s) if isinstance(factor, nn.Module) else factor * s
            y = y + s + bottleneck(modules[f"{role}@vision.0"], s + y)
    made = run(x)
    assert torch.allclose(made[0] if isinstance(made, tuple) else made, y, rtol=0, atol=1e-12)


def test_what_a_family_lacks_is_an_error_that_says_what_there_is() -> None:
    for name, config in (("timm swin v2", PREFIX), ("timm convnext", BOTTLENECK), ("timm convnext", PREFIX)):
        model = families.build(name)
        before, base = checks.snapshot(model), families.see(model)
        with pytest.raises(AdapterKitError, match="it offers: "):
            ak.Adapters(model).add("a", config)
        checks.assert_restored(model, before)
        assert torch.equal(families.see(model), base)


def test_stages_are_tags() -> None:
    model = families.build("timm swin")
    assert set(ak.points(model, "attn.q@stage=1").ids) == {"attn.q@vision.1.0"}
    assert ak.points(model, "attn.q@stage=0,layer=1").ids == ["attn.q@vision.0.1"]
