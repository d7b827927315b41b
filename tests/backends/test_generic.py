"""Models that no family claims, mapped by their layers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

import adapterkit as ak
from adapterkit.errors import IncompatibleTargetError, NotMergeableError
from adapterkit.mapping.layouts import weight_layout
from adapterkit.points import Span, WeightLayout
from tests.backends import vision_checks as checks
from tests.backends import vision_models
from tests.backends.generic_models import WIDTH, ids, mixed
from tests.backends.own import own

_SELF = [f"attn.{p}@model.{{0}}.self_attn" for p in "qkv"] + ["attn.o@model.{0}.self_attn.out_proj"]
_CROSS = [f"cross.{p}@model.{{0}}.multihead_attn" for p in "qkv"] + ["cross.o@model.{0}.multihead_attn.out_proj"]
_FEED_FORWARD = ["mlp.up@model.{0}.linear1", "mlp.down@model.{0}.linear2"]
_NAMED = [f"{sort}.{p}@model.{{0}}" for sort in ("attn", "cross") for p in "qkvo"]
_OWN = ["linear@model.{0}.widen", "linear@model.{0}.narrow"]


def at(path: str, ids: list[str]) -> list[str]:
    return [text.format(path) for text in ids]


def run(model: nn.Module) -> Tensor:
    return model(ids())


def test_the_ids_are_these() -> None:
    assert own(ak.points(mixed())).ids == [
        "embed.tokens@model.embed",
        *at("encoder.layers.0", _SELF + _FEED_FORWARD),
        *at("encoder.layers.1", _SELF + _FEED_FORWARD),
        *at("decoder", _SELF + _CROSS + _FEED_FORWARD),
        *(f"attn.{p}@model.pool" for p in "qkv"),
        "attn.o@model.pool.out_proj",
        *at("blocks.0", _NAMED + _OWN),
        "linear@model.blocks.0.shared",
        *at("blocks.1", _NAMED + _OWN),
        "conv@model.conv",
        "head@model.lm_head",
    ]


def test_every_layer_is_mapped_once() -> None:
    model = mixed()
    points = ak.points(model)
    mapped = [model.get_submodule(p.path) for p in points]
    assert all(m in mapped for m in model.modules() if weight_layout(m) is not None)
    assert len({(id(m), p.role) for m, p in zip(mapped, points, strict=True)}) == len(points)
    assert [p.tags.get("layer") for p in ak.points(model, "linear@layer=1")][-1] == 1


def test_the_projections_of_torch_are_read_parts() -> None:
    points = {p.id: p for p in ak.points(mixed())}
    fused, single = points["attn.k@model.encoder.layers.0.self_attn"], points["attn.k@model.pool"]
    assert fused.span == Span(WIDTH, WIDTH)
    assert fused.layout == WeightLayout(
        "linear", True, access="read", parameter="in_proj_weight", bias_parameter="in_proj_bias"
    )
    assert single.span is None
    assert single.shape == (WIDTH, 4)
    assert single.layout == WeightLayout("linear", access="read", parameter="k_proj_weight", bias_parameter="")


def test_presets_keep_out_of_embeddings_and_heads() -> None:
    roles = {p.role for p in ak.points(mixed(), "all")}
    assert roles == {f"{s}.{p}" for s in ("attn", "cross") for p in "qkvo"} | {"mlp.up", "mlp.down", "linear", "conv"}


def test_an_adapter_acts_trains_and_leaves() -> None:
    checks.check_adapter(mixed(), run, ak.LoRA(rank=2, targets="*"))


def test_merged_is_unmerged() -> None:
    checks.check_merge(mixed(), run, 1e-10)


def test_parts_of_torchs_projection_are_the_dense_update() -> None:
    model = mixed()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="path:encoder.layers.1.self_attn"))
    checks.randomise(adapters)
    adapters.freeze()
    y = run(model)
    modules: dict[str, Any] = adapters.modules("a")
    adapters.detach()
    assert [key.partition("@")[0] for key in modules] == ["attn.q", "attn.k", "attn.v"]
    model.encoder.layers[1].self_attn.in_proj_weight += torch.cat([m.B @ m.A for m in modules.values()])
    assert torch.allclose(y, run(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targets", ["attn.*@layer=0", "mlp.*@layer=0"])
def test_the_fast_path_of_torchs_encoder_is_adapted_too(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation without gradients it hands weights to a kernel and calls none of its modules."""
    kernel, taken = torch._transformer_encoder_layer_fwd, []  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or kernel(*a))
    encoder = mixed().encoder
    adapters = ak.Adapters(encoder)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    adapters.add("a", ak.LoRA(rank=2, targets=targets))
    with torch.no_grad():
        base = encoder(x)
    checks.randomise(adapters)
    slow = encoder(x)
    assert len(taken) == 2
    with torch.no_grad():
        assert torch.allclose(encoder(x), slow, atol=1e-12)
    assert len(taken) == 4
    assert not torch.allclose(base, slow)


def test_a_shared_layer_is_adapted_wherever_it_is_called() -> None:
    model = mixed()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="path:blocks.0.shared"))
    checks.randomise(adapters)
    adapters.freeze()
    y = run(model)
    factors = next(iter(adapters.modules("a").values()))
    adapters.detach()
    model.blocks[1].shared.weight += factors.B @ factors.A
    assert torch.allclose(y, run(model), rtol=1e-10, atol=1e-12)


def test_a_head_is_known_by_its_name_or_from_the_model() -> None:
    with torch.device("meta"):
        resnet = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3)
        marian = MarianMTModel(MarianConfig(d_model=16, encoder_layers=1, decoder_layers=1))
        plain = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0)
    assert [p.path for p in ak.points(resnet, "head")] == ["fc"]
    assert [p.path for p in ak.points(marian, "head")] == ["lm_head"]
    assert "head" not in {p.role for p in ak.points(plain)}
    assert not [p for p in ak.points(resnet, "all") if p.path == "fc"]


class Standardised(nn.Conv2d):
    """Computes with another weight than it holds, and pads its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.bias, self.stride)


class Shifted(nn.Embedding):
    """Takes no indices."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[-1]) + 2)


def test_a_layer_with_a_forward_of_its_own_is_adapted_in_its_weight() -> None:
    model = nn.Sequential(Standardised(3, 4, 2, stride=2), Shifted(8, 4)).double().requires_grad_(False)
    assert [p.layout.access for p in ak.points(model)] == ["read", "read"]  # type: ignore[union-attr]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    conv, embedding = model[0], model[1]
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    checks.randomise(adapters)
    y, rows = conv(x), embedding(x)
    with adapters.merged():
        assert torch.allclose(conv(x), y, rtol=1e-10)
        assert torch.allclose(embedding(x), rows, rtol=1e-10)
    y.sum().backward()
    assert all(p.grad is not None for p in adapters.modules("a")["conv@model.0"].parameters())
    adapters.detach()
    assert not torch.allclose(conv(x), y)
    assert not torch.allclose(embedding(x), rows)


def test_a_file_gives_the_same_bits(tmp_path: Path) -> None:
    model = mixed()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    checks.randomise(adapters)
    adapters.freeze()
    y, path = run(model), adapters.save("a", tmp_path / "a.safetensors")
    fresh = ak.Adapters(twin := mixed())
    fresh.load(path, "a")
    fresh.activate("a")
    assert torch.equal(run(twin), y)


def test_the_model_itself_may_be_a_layer() -> None:
    layer = nn.Linear(3, 2)
    adapters = ak.Adapters(layer)
    adapters.add("a", ak.LoRA(rank=1, targets="linear"))
    checks.randomise(adapters)
    module = adapters.modules("a")["linear@model"]
    x = torch.randn(4, 3)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight + module.B @ module.A, layer.bias), atol=1e-6)  # type: ignore[operator]
    assert ak.points(layer).ids == ["linear@model"]


class Reading(nn.Module):
    """Reads the weights of plain layers in every way that models of libraries do, and calls them too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.table(ids) @ self.table.weight.T).to(self.a.weight.dtype)  # as in relative positions, VQ codebooks
        x = F.linear(self.a(x), torch.cat([self.a.weight, self.b.weight]), torch.cat((self.a.bias, self.b.bias)))
        x = x.mT[:, :WIDTH] + self.b.weight @ x.mT[:, WIDTH:] + self.a.bias[:, None] - self.b.weight[0, 0]
        return self.conv(x) + F.conv1d(x, self.conv.weight.squeeze(1)[:, None], padding=1, groups=WIDTH)


def test_a_weight_that_is_read_without_notice_is_adapted() -> None:
    torch.manual_seed(0)
    model = Reading().double().requires_grad_(False)
    checks.check_adapter(model, lambda m: m(ids() % WIDTH), ak.LoRA(rank=2, targets="*"))
    checks.check_merge(model, lambda m: m(ids() % WIDTH), 1e-10)


def test_asking_for_the_dtype_needs_no_equivalent_weight() -> None:
    class Module(ak.AdapterModule):
        def forward(self, x: Tensor, base: Any) -> Tensor:
            return base(x) + 1

    class Shift(ak.AdapterConfig):
        kinds = frozenset({"weight"})

        def build(self, point: ak.InjectionPoint) -> Module:
            return Module()

    class Asking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self[0].weight.dtype))

    for model, expected in (
        (Asking(nn.Linear(3, 2)), contextlib.nullcontext()),
        (Reading(), pytest.raises(NotMergeableError)),
    ):
        ak.Adapters(model).add("a", Shift(targets="linear"))
        with expected:
            model(torch.ones(2, 3, dtype=torch.float64) if isinstance(model, Asking) else ids() % WIDTH)


def test_outside_of_a_forward_a_weight_is_the_bases() -> None:
    model = Reading()
    weight, hooks = model.a.weight, (len(model._forward_hooks), len(model._forward_pre_hooks))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    model(ids() % WIDTH)
    with pytest.raises(TypeError):
        model(None)
    assert model.a.weight is weight
    adapters.detach()
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks == (0, 0)


def test_points_are_the_same_while_adapters_are_there() -> None:
    model = mixed()
    before = ak.points(model)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="*"))
    assert ak.points(model) == before
    with adapters.merged():
        assert ak.points(model) == before


def test_a_family_can_be_mapped_by_its_layers_instead() -> None:
    model = vision_models.timm_vit()
    assert "prompt@vision" not in ak.points(model, backend="generic").ids
    assert "prompt@vision" in ak.points(model).ids
    ak.Adapters(model, backend="generic").add("a", ak.LoRA(rank=1, targets="mlp.*"))
    later = ak.Adapters(model)  # maps the model as its adapters were placed
    assert set(later.modules("a")) <= set(later.points().ids)


def test_a_pipelines_other_parts_are_left_alone(tmp_path: Path) -> None:
    pipe = vision_models.pipeline(tmp_path)
    pipe.register_modules(safety_checker=nn.Linear(2, 2))
    assert {p.component for p in ak.points(pipe)} == {"unet", "text_encoder"}


def test_prefixes_have_nowhere_to_go() -> None:
    with pytest.raises(IncompatibleTargetError, match=r"Prefix acts at attention points.*offers: norm, weight"):
        ak.Adapters(mixed()).add("a", ak.Prefix())


@pytest.mark.parametrize("parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_may_be_parametrized_after_an_adapter(parametrize: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=1, targets="*"))
    checks.randomise(adapters)
    x = torch.randn(5, 3)
    y = model(x)
    parametrize(model[0])
    assert torch.allclose(model(x), y, atol=1e-6)


def test_a_detached_layer_works_under_a_hook_that_holds_its_forward() -> None:
    """accelerate's hooks keep the forward that they found, and give it back when they go."""
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    y = layer(x)
    adapters = ak.Adapters(layer)
    adapters.add("a", ak.LoRA(rank=1, targets="linear"))
    held = layer.forward
    layer.forward = lambda x: held(x)  # type: ignore[method-assign]
    adapters.detach()
    assert torch.equal(layer(x), y)
    layer.forward = held  # type: ignore[method-assign]
    assert torch.equal(layer(x), y)


@pytest.mark.slow
def test_a_compiled_model_reads_what_acts() -> None:
    model = Reading()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="*"))
    checks.randomise(adapters)
    x = ids() % WIDTH
    y, compiled = model(x), torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), y, atol=1e-5)
    adapters.activate(None)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert not torch.allclose(compiled(x), y, atol=1e-5)
