"""What cannot be adapted, or is misspelt: a typed error that says how to mend it, and a model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import adapterkit as ak
from adapterkit import errors
from adapterkit.backends.generic import write_plugin
from tests.backends import language_models, vision_models
from tests.backends import vision_checks as checks
from tests.backends.generic_models import mixed


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (ak.LoRA(targets="path:decoder.layer9"), errors.TargetNotFoundError, "decoder.layer9.*Closest: .*decoder"),
        (ak.LoRA(targets="atn.q"), errors.TargetNotFoundError, r"'atn.q' is unknown here. Closest: attn.q"),
        (ak.LoRA(targets="moe.up"), errors.TargetNotFoundError, r"'moe.up' is unknown here. Closest: .*mlp.up"),
        (ak.LoRA(targets="linear@layer=7"), errors.TargetNotFoundError, "layer is one of 0, 1"),
        (
            ak.Prefix(),
            errors.IncompatibleTargetError,
            "attention points, and Mixed offers none .it offers: norm, weight",
        ),
        (ak.Bottleneck(), errors.IncompatibleTargetError, "output points, and Mixed offers none"),
    ],
    ids=["no such path", "typo", "role of others", "no such layer", "prefix", "bottleneck"],
)
def test_targets_that_do_not_fit(config: ak.AdapterConfig, error: type[Exception], text: str) -> None:
    model = mixed()
    before = checks.snapshot(model)
    with pytest.raises(error, match=text):
        ak.Adapters(model).add("a", config)
    checks.assert_restored(model, before)


def test_a_role_that_the_family_lacks() -> None:
    model = vision_models.timm_vit()
    with pytest.raises(errors.TargetNotFoundError, match=r"VisionTransformer.*'mlp.gate'.*Closest: mlp.up, mlp.down"):
        ak.Adapters(model).add("a", ak.LoRA(targets="attn.q mlp.gate"))
    with pytest.raises(errors.IncompatibleTargetError, match=r"LoRA acts at weight points.*attention points such as"):
        ak.Adapters(model).add("a", ak.LoRA(targets="attn.kv"))


def test_models_without_a_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    for model in (nn.Sequential(nn.LayerNorm(2), nn.GELU()), traced):
        with pytest.raises(errors.UnsupportedModelError, match=r"has no adaptable layer: no Linear, .*scripted"):
            ak.points(model)
        with pytest.raises(errors.UnsupportedModelError, match="has no adaptable layer"):
            ak.Adapters(model).add("a", ak.LoRA(targets="linear"))


def test_a_lazy_layer_must_have_been_run() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    with pytest.raises(errors.UnsupportedModelError, match="1 is a LazyLinear whose sizes are not known yet; run"):
        ak.points(model)
    model(torch.ones(1, 2))
    assert [p.shape for p in ak.points(model)] == [(3, 2), (4, 3)]


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "error", "text"),
    [
        ({"mlp.up": "block.*.widen"}, errors.TargetNotFoundError, "'block.*.widen'.*'mlp.up'.*Closest: .*blocks.0"),
        ({"mlp.up": "blocks.*.widen|oops"}, errors.TargetNotFoundError, "'oops'"),
        ({"mlp.up": "encoder.layers.*.norm?"}, errors.IncompatibleTargetError, "without a weight.*LayerNorm"),
        ({"attn.qkv": "encoder.layers.0.self_attn"}, errors.IncompatibleTargetError, "MultiheadAttention"),
        ({"a": "blocks.*.widen", "b": "blocks.0.*"}, errors.ConfigError, "'blocks.0.widen' is claimed by 'a' and by"),
        ({"MLP up": "blocks.*.widen"}, errors.ConfigError, "'MLP up' is no role"),
        ({"mlp.up": ""}, errors.ConfigError, "'mlp.up' needs a glob"),
        ({"mlp.up": ["blocks.*.widen"]}, errors.ConfigError, "'mlp.up' needs a glob"),
        ("mlp.up", errors.ConfigError, "expected a mapping"),
    ],
)
def test_roles_that_do_not_fit(roles: Any, error: type[Exception], text: str) -> None:
    for call in (ak.points, ak.Adapters):
        with pytest.raises(error, match=text):
            call(mixed(), roles=roles)


def test_a_fused_projection_keeps_its_parts() -> None:
    with pytest.raises(errors.ConfigError, match=r"'blocks.0.attn.qkv' cannot be 'mine': it is fused and holds attn.q"):
        ak.points(vision_models.timm_vit(), roles={"mine": "blocks.*.qkv"})


@pytest.mark.parametrize(
    ("name", "models", "roles", "text"),
    [
        ("My Family", ["a:B"], {"x": "*"}, "name 'My Family'"),
        ("mine", ["B"], {"x": "*"}, "holds 'B'"),
        ("mine", [], {"x": "*"}, "non-empty"),
        ("mine", ["a:B"], {"X": "*"}, "'X' is no role"),
        ("mine", ["a:B"], {}, "no roles to save"),
    ],
)
def test_plugins_that_cannot_be_written(name: str, models: list[str], roles: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=text):
        write_plugin(tmp_path / "p", name, models, roles)
    assert not (tmp_path / "p").exists()


def test_a_plugin_is_never_overwritten(tmp_path: Path) -> None:
    write_plugin(tmp_path, "mine", ["a:B"], {"x": "*"})
    before = (tmp_path / "pyproject.toml").read_bytes()
    with pytest.raises(errors.ConfigError, match=r"pyproject.toml exists already"):
        write_plugin(tmp_path, "mine", ["a:C"], {"x": "*"})
    assert (tmp_path / "pyproject.toml").read_bytes() == before


# --- wrapped ---------------------------------------------------------------------------------------------------------


def _peft(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]


def _injected(model: nn.Module) -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)


@pytest.mark.parametrize("wrap", [_peft, _injected])
@pytest.mark.parametrize("make", [mixed, lambda: language_models.build("Llama")], ids=["generic", "family"])
def test_what_peft_has_changed_is_refused(make: Callable[[], Any], wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(make())
    before = checks.snapshot(model)
    for call in (ak.points, ak.Adapters):
        with pytest.raises(errors.AttachError, match=r"PEFT has put its .*model.unload\(\)"):
            call(model)
    checks.assert_restored(model, before)


def test_what_peft_gave_back_is_adapted() -> None:
    model = _peft(mixed())
    assert ak.points(model.unload()) == ak.points(mixed())  # type: ignore[operator]


def test_a_pipeline_with_pefts_layers_is_refused(tmp_path: Path) -> None:
    pipe = vision_models.pipeline(tmp_path)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(errors.AttachError, match=r"unload_lora_weights\(\)"):
        ak.Adapters(pipe)


def _wrapped(cls: type[nn.Module], inner: nn.Module) -> nn.Module:
    """Wraps as `cls` does, without its constructor, which wants a process group."""
    wrapper = cls.__new__(cls)
    nn.Module.__init__(wrapper)
    wrapper.module = inner
    return wrapper


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, lambda m: _wrapped(nn.parallel.DistributedDataParallel, m), nn.DataParallel],
    ids=["compile", "ddp", "data parallel"],
)
def test_wrappers_are_peeled_around_a_model_and_refused_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has views on wrapping
        assert ak.points(wrap(mixed())) == ak.points(mixed())
        model = language_models.build("Llama")
        model.model.layers[1] = wrap(model.model.layers[1])
    with pytest.raises(
        errors.AttachError, match=r"at model.layers.1 there is a \w+ around a part. Add adapters .*first"
    ):
        ak.points(model)


@pytest.mark.parametrize("inside", [False, True])
def test_flattened_parameters_are_refused(inside: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = _wrapped(FullyShardedDataParallel, mixed())
    model = nn.Sequential(model) if inside else model
    with pytest.raises(errors.AttachError, match=r"FullyShardedDataParallel has flattened .*fully_shard"):
        ak.Adapters(model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mixed()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    before = [type(module) for module in model.modules()]
    with pytest.raises(errors.AttachError, match=r"blocks.0.narrow: its weights are sharded.*before"):
        ak.Adapters(model).add("a", ak.LoRA(targets="path:blocks.0.narrow"))
    assert [type(module) for module in model.modules()] == before


# --- weights that are not there to be merged into --------------------------------------------------------------------


class Quantized(nn.Linear):
    """As bitsandbytes does it: a Linear whose weight is packed integers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        scale = self.weight.detach().abs().max() / 127
        packed = torch.round(self.weight.detach() / scale).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _weight_norm(inputs: int, outputs: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(inputs, outputs))


@pytest.mark.parametrize(
    ("layer", "text"), [(Quantized, "no dense floating-point weight"), (_weight_norm, "no dense floating-point weight")]
)
def test_an_adapter_acts_on_a_weight_that_it_cannot_be_merged_into(layer: Any, text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer(4, 4))
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="linear"))
    checks.randomise(adapters)
    before, y = checks.snapshot(model), model(torch.ones(1, 4))
    with pytest.raises(errors.NotMergeableError, match=text):
        adapters.merge()
    checks.assert_restored(model, before)
    assert torch.equal(model(torch.ones(1, 4)), y)
    with adapters.disabled():
        assert not torch.equal(model(torch.ones(1, 4)), y)
    adapters.detach()
