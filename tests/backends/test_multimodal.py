"""Models of several towers: every tower is a component, mapped as the model that it is, and selected by its tag."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, MixtralConfig, MixtralModel

import adapterkit as ak
from adapterkit.backend import Reach
from adapterkit.backends.experts import one_by_one
from adapterkit.mapping.model import map_model
from adapterkit.points import InjectionPoint, OutputLayout
from adapterkit.testing import toys
from tests.backends import multimodal_models as models
from tests.backends import vision_checks as checks
from tests.backends import vision_families as families
from tests.backends.own import own

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="all", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0)

# Path of each tower that a backend maps alone too.
TOWERS = [
    ("clip", "text", "text_model"),
    ("clip", "vision", "vision_model"),
    ("siglip", "text", "text_model"),
    ("siglip", "vision", "vision_model"),
    ("llava", "vision", "model.vision_tower"),
    ("llava", "language", "model.language_model"),
]
BLOCK = "attn.kv attn.q attn.k attn.v attn.o attn mlp.gate mlp.up mlp.down mlp"
QWEN_BLOCK = "attn.kv attn attn.q attn.k attn.v attn.o mlp mlp.gate mlp.up mlp.down"


def described(point: InjectionPoint, prefix: str = "") -> tuple[Any, ...]:
    """All that must be alike in a tower and in the model that it is."""
    layout: Any = point.layout
    if isinstance(layout, OutputLayout):
        paths = (layout.residual, layout.norm_in, layout.norm_out)
        layout = tuple(path and f"{prefix}{path}" for path in paths)
    return point.role, point.kind, f"{prefix}{point.path}".rstrip("."), point.shape, point.span, layout


@pytest.mark.parametrize(("name", "tower", "path"), TOWERS)
def test_a_tower_is_mapped_as_the_model_that_it_is(name: str, tower: str, path: str) -> None:
    model = models.build(name)
    alone = list(own(ak.points(model.get_submodule(path))))
    inside = [p for p in own(ak.points(model, f"@tower={tower}")) if p.path.startswith(f"{path}.")]
    assert {described(p) for p in inside} == {described(p, f"{path}.") for p in alone}
    assert sorted(p.id for p in inside) == sorted(p.id for p in alone)
    assert {(p.tags["tower"], p.model) for p in inside} == {(tower, next(iter(map_model(model).components)))}


def test_ids_of_what_stands_beside_the_towers() -> None:
    def beside(name: str) -> list[str]:
        component = "clip" if name in ("clip", "siglip") else "vision_language"
        return own(ak.points(models.build(name), f"@component={component}")).ids if name != "siglip" else []

    assert beside("clip") == ["head@clip.vision", "head@clip.text"]
    assert beside("siglip") == []
    projector = ["proj.in@vision_language.projector", "proj.out@vision_language.projector"]
    assert beside("llava") == [*projector, "head@vision_language.language"]


def in_towers(vision: str, projector: str, language: str) -> list[str]:
    towers = {"vision": vision, "vision.projector": projector, "language": language}
    places = [(name, word.partition("/")) for name, words in towers.items() for word in words.split()]
    return [f"{role}@{name}{'.' if site else ''}{site}" for name, (role, _, site) in places]


def in_layers(roles: str) -> str:
    return " ".join(f"{role}/{layer}" for layer in (0, 1) for role in roles.split())


def test_ids_of_qwen() -> None:
    language, head = f"embed.tokens tokens {in_layers(BLOCK)}", "head@vision_language.language"
    expected = in_towers(f"embed.patch {in_layers(QWEN_BLOCK)}", "proj.in proj.out", language)
    assert sorted(own(ak.points(models.build("qwen"))).ids) == sorted([*expected, head])
    vision = f"embed.patch embed.pos {in_layers(QWEN_BLOCK.replace('mlp.gate ', ''))}"
    expected = in_towers(vision, "proj.in proj.out proj.in/0 proj.out/0", language)
    assert sorted(own(ak.points(models.build("qwen3"))).ids) == sorted([*expected, head])


@pytest.mark.parametrize("name", models.MAKE)
def test_every_layer_is_mapped_or_ignored_for_a_reason(name: str) -> None:
    model = models.build(name)
    points = ak.points(model)
    backends = [component.backend for component in map_model(model).components.values()]
    ignored = {glob: why for one in backends for glob, why in getattr(one, "ignored", {}).items()}
    mapped = {p.path for p in points if p.kind == "weight"}
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, kinds)]
    assert [x for x in layers if x not in mapped and not any(fnmatchcase(x, glob) for glob in ignored)] == []
    assert all(ignored.values())


def test_a_tower_of_another_family_is_mapped_as_it_would_be_alone() -> None:
    """LLaVA takes any image encoder; here one that its table knows nothing of."""
    model = models.build("llava")
    model.model.vision_tower = families.build("dinov2 gated")
    alone = own(ak.points(families.build("dinov2 gated")))
    inside = own(ak.points(model, "@tower=vision"))
    assert sorted(p.id for p in inside) == sorted(p.id for p in alone)


def test_a_tower_of_experts_reads_them_one_by_one() -> None:
    """What a tower's own backend says of a point holds inside too, with paths from the model around."""
    model = models.build("llava")
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=16, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model.model.language_model = MixtralModel(config)
    expert = next(point for point in ak.points(model) if "expert" in point.tags)
    assert expert.path.startswith("model.language_model.")
    assert map_model(model).reach(expert) == Reach(plain=one_by_one, repeats="each")


def test_what_attends_in_a_tower_is_found_from_the_model_around(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.language_model, model.top = toys.ToyModel(), nn.Linear(2, 2)
    toys.register()
    told = {"blocks.1.up": lambda module, positions, args, kwargs: (args, kwargs)}
    seen: list[str] = []
    monkeypatch.setattr(
        toys.ToyBackend, "reach", lambda self, model, point: seen.append(point.path) or Reach(attending=told)
    )
    [point] = ak.points(model, "tokens")
    assert point.path == "language_model.embed"
    assert map_model(model).reach(point).attending == {"language_model.blocks.1.up": told["blocks.1.up"]}
    assert seen == ["embed"]


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, PREFIX], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", models.MAKE)
def test_an_adapter_comes_acts_and_goes(name: str, config: ak.AdapterConfig) -> None:
    checks.check_adapter(models.build(name), models.see, config)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *((name, torch.float64, 1e-10) for name in ("clip", "siglip", "llava")),
        # Their image encoders turn queries and keys in single precision.
        *((name, torch.float32, 1e-5) for name in ("qwen", "qwen3")),
    ],
)
def test_merged_equals_unmerged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    checks.check_merge(models.build(name, dtype), models.see, tolerance)


@pytest.mark.parametrize("name", models.MAKE)
def test_a_saved_adapter_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, twin = models.build(name), models.build(name)
    adapters, others = ak.Adapters(model), ak.Adapters(twin)
    adapters.add("a", LORA)
    checks.randomise(adapters)
    adapters.save("a", tmp_path / "a.safetensors")
    others.load(tmp_path / "a.safetensors", "a")
    others.activate("a")
    adapters.freeze("a")  # torch has other kernels for what is trained
    with torch.no_grad():
        assert torch.equal(models.see(twin), models.see(model))


@pytest.mark.parametrize("name", models.GENERATING)
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = models.build(name)
    adapters = ak.Adapters(model)
    for key, config in (("a", LORA), ("b", BOTTLENECK), ("c", PREFIX)):
        adapters.add(key, config)
        checks.randomise(adapters, key, scale=0.1)
    adapters.activate(["a", "b", "c"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    asked = {"output_logits": True, "return_dict_in_generate": True}
    runs = [model.generate(**models.inputs(model), **options, **asked, use_cache=cache) for cache in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for with_cache, without in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)


def features(model: Any) -> tuple[Tensor, Tensor]:
    given = models.inputs(model)
    text = model.get_text_features(input_ids=given["input_ids"])
    image = model.get_image_features(pixel_values=given["pixel_values"])
    return tuple(made if isinstance(made, Tensor) else made.pooler_output for made in (text, image))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_an_adapter_of_one_tower_leaves_the_other_alone(name: str) -> None:
    for tower, acts in (("vision", (False, True)), ("text", (True, False))):
        model = models.build(name)
        before = features(model)
        adapters = ak.Adapters(model)
        adapters.add("a", ak.LoRA(rank=2, targets=f"attn.*@tower={tower}"))
        checks.randomise(adapters)
        with torch.no_grad():
            assert tuple(not torch.equal(*pair) for pair in zip(before, features(model), strict=True)) == acts


def test_a_prefix_of_qwen_stands_in_front_of_every_window() -> None:
    """Its image encoder calls its attention once a window: here four windows of four patches in each of two images."""
    model = models.build("qwen")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Prefix(length=3, init_std=1.0, targets="attn.kv@tower=vision,layer=0"))
    checks.randomise(adapters, scale=1.0)
    module, [prefix] = model.model.visual.blocks[0].attn, adapters.modules("a").values()
    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=(*args, kwargs.get("hidden_states"))[0], **kwargs), with_kwargs=True
    )
    module.proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    models.see(model)
    query, key, value = module.qkv(seen["x"]).view(32, 3, 2, 8).transpose(0, 1)
    cos, sin = (t.unsqueeze(1) for t in seen["position_embeddings"])
    query, key = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (query, key))
    query, key, value = (t.view(8, 4, 2, 8).transpose(1, 2) for t in (query, key, value))
    mixed = checks.soft(query, *checks.prefixed(prefix, key, value), 8**-0.5)
    assert seen["cu_seqlens"].tolist() == list(range(0, 33, 4))
    torch.testing.assert_close(seen["mixed"], mixed.transpose(1, 2).reshape(32, 16), rtol=1e-5, atol=1e-5)


def test_lora_on_qwens_fused_projection_is_a_sum_on_its_rows() -> None:
    model = models.build("qwen")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets="attn.{q,v}@tower=vision"))
    checks.randomise(adapters)
    qkv, modules = model.model.visual.blocks[1].attn.qkv, adapters.modules("a")
    x = torch.randn(5, 16)
    expected = F.linear(x, qkv.weight, qkv.bias)
    for start, role in ((0, "attn.q"), (32, "attn.v")):
        factors: Any = modules[f"{role}@vision.1"]
        expected[:, start : start + 16] += x @ factors.A.T @ factors.B.T * 2.5
    torch.testing.assert_close(qkv(x), expected, rtol=1e-5, atol=1e-5)


def test_a_tower_model_in_a_pipeline_has_the_pipelines_word_for_it() -> None:
    """Qwen2.5-VL is the text encoder of some pipelines: its ids are one component's, with towers in their sites."""
    pipe = SimpleNamespace(components={"text_encoder": models.build("qwen")})
    points = own(ak.points(pipe))
    assert {p.component for p in points} == {"text_encoder"}
    assert {p.tags["tower"] for p in points} == {"vision", "projector", "language"}
    language = f"embed.tokens tokens {in_layers(BLOCK)} head"
    vision = [
        f"{role}@text_encoder.vision{at and '.'}{at}" for role, at in words(f"embed.patch {in_layers(QWEN_BLOCK)}")
    ]
    beside = [f"{role}@text_encoder.projector" for role in ("proj.in", "proj.out")]
    inside = [f"{role}@text_encoder.language{at and '.'}{at}" for role, at in words(language)]
    assert sorted(points.ids) == sorted([*vision, *beside, *inside])


def words(places: str) -> list[tuple[str, str]]:
    return [(role, site) for role, _, site in (word.partition("/") for word in places.split())]


def test_llava_is_known_by_its_older_names_too() -> None:
    """Towers at the top, and a language model with its own head."""
    new, old = models.build("llava"), nn.Module()
    old.vision_tower, old.multi_modal_projector = new.model.vision_tower, new.model.multi_modal_projector
    old.language_model = LlamaForCausalLM(new.config.text_config)
    here, there = own(ak.points(new)), own(ak.points(old, backend="vision_language"))
    assert sorted(p.id for p in there) == sorted("head@language" if p.role == "head" else p.id for p in here)
    assert there[-1].path == "language_model.lm_head"


def test_presets_leave_heads_and_embeddings_alone() -> None:
    for name in models.MAKE:
        chosen = ak.points(models.build(name), "all")
        assert len(chosen) > 30
        assert not [p.id for p in chosen if p.role.startswith(("head", "embed"))]


def test_a_tower_alone_is_no_tower() -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**families.SIZES))
    assert {p.id.partition("@")[2].partition(".")[0] for p in ak.points(model)} == {"vision"}
    assert not [p for p in ak.points(model) if "tower" in p.tags]
