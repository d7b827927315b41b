"""The merged model for good: a plain model is left, with the base's keys, class, hooks and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.handle import test_layer_handlers as layers
from tests.handle.test_layer_handlers import taught  # noqa: F401 - a fixture
from tests.values import randomize

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    toys.register()


def baked_toy(config: ak.AdapterConfig, **choice: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A toy model with an adapter in its weights, and what it gave before and after."""
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    adapters.add("x", config)
    randomize(adapters, "x")
    before = model(toys.ids())
    adapters.bake(**choice)
    assert not list(adapters)
    return model, before, model(toys.ids())


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that is known of a tree of modules, but for the values."""
    return {
        path: (
            type(one),
            sorted(one.__dict__),
            [*one._modules],
            {name: (p.shape, p.dtype, p.requires_grad) for name, p in one._parameters.items() if p is not None},
            [dict(one._forward_hooks), dict(one._forward_pre_hooks)],
            one.training,
        )
        for path, one in module.named_modules()
    }


@pytest.mark.parametrize(
    "config",
    [ak.LoRA(rank=2, targets="linear conv"), ak.DoRA(rank=2), ak.LoRA(rank=2, targets="attn.{q,v}")],
)
def test_a_plain_model_is_left(config: ak.AdapterConfig) -> None:
    plain = toys.ToyModel().eval()
    keys, known = [*plain.state_dict()], state_of(plain)
    model, before, after = baked_toy(config)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, plain(toys.ids()))
    assert [*model.state_dict()] == keys
    assert state_of(model) == known
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(toys.ids()), after)
    again = ak.Adapters(model)  # and can be adapted anew
    again.add("y", ak.LoRA(rank=2))
    again.detach()
    assert torch.equal(model(toys.ids()), after)


def test_the_choice_is_baked_and_everything_else_is_taken_off() -> None:
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    for i, name in enumerate("abc"):
        adapters.add(name, ak.LoRA(rank=2, targets="attn.* mlp.*"))
        randomize(adapters, name, i)
    adapters.activate({"a": 0.5, "b": {"*@layer=0": 1.0}})
    before = model(toys.ids())
    adapters.activate("c")
    with pytest.raises(errors.StateError, match="activated"), adapters.activated("a"):
        adapters.bake()
    adapters.bake({"a": 0.5, "b": {"*@layer=0": 1.0}})
    assert (list(adapters), adapters.active) == ([], {})
    torch.testing.assert_close(model(toys.ids()), before, rtol=1e-4, atol=1e-5)


def test_what_is_merged_is_baked() -> None:
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2))
    randomize(adapters, "a")
    adapters.add("b", ak.LoRA(rank=2))
    adapters.merge("a")
    merged = model(toys.ids())
    with pytest.raises(errors.StateError, match="another choice"):
        adapters.bake("b")
    assert torch.equal(model(toys.ids()), merged)
    adapters.bake()
    assert torch.equal(model(toys.ids()), merged)
    with pytest.raises(errors.StateError, match="nothing is merged"):
        adapters.unmerge()


class Biased(ak.AdapterModule):
    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(point.out_features))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias if bias is None else bias + self.bias


class Bias(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets = "mlp.*"

    def build(self, point: ak.InjectionPoint) -> Biased:
        return Biased(point)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ak.Trainable("head", outputs=3), r"would be \(3, 8\), and the base's is \(11, 8\)"),
        (ak.Prefix(length=2), "attention, not on a weight"),
        (ak.Bottleneck(), "output, not on a weight"),
        (Bias(targets="mlp.*"), "has no bias, and the merged layer would need one"),
        (ak.LoRA(rank=2, targets="attn.* embed.tokens"), r"embed\.weight and head\.weight are one weight"),
        (ak.LoRA(rank=2, targets="head"), r"embed\.weight and head\.weight are one weight"),
    ],
)
def test_what_no_checkpoint_of_the_base_holds_is_refused(config: ak.AdapterConfig, told: str) -> None:
    model = toys.ToyModel().eval()
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = ak.Adapters(model)
    adapters.add("x", config)
    randomize(adapters, "x")
    before = model(toys.ids())
    with pytest.raises(errors.NotMergeableError, match=told):
        adapters.bake()
    assert adapters.active == {"x": 1.0}
    assert torch.equal(model(toys.ids()), before)
    adapters.detach()
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


@pytest.mark.usefixtures("taught")
def test_what_is_no_plain_layer_is_refused() -> None:
    model = layers.net()
    keys, before = [*model.state_dict()], model(layers.X)
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets="all"))
    with pytest.raises(errors.NotMergeableError, match="load the base unquantized"):
        adapters.bake()
    assert adapters.active == {"x": 1.0}
    adapters.detach()
    assert [*model.state_dict()] == keys
    assert torch.equal(model(layers.X), before)


def test_flags_are_those_that_were_found() -> None:
    model = toys.ToyModel()
    model.blocks[0].requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets="attn.* mlp.*"))
    adapters.bake()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, num_key_value_heads=1, **SIZES, **options)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("targets", "tied"), [("linear", False), ("linear", True), ("head", True), ("embed.tokens attn.q", True)]
)
@pytest.mark.parametrize("shards", ["50GB", "4KB"])
def test_a_language_model_is_saved_with_the_keys_of_its_base(
    targets: str, tied: bool, shards: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=tied)
    keys = {*model.state_dict()}
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets=targets))
    randomize(adapters, "x")
    ids = torch.arange(8)[None]
    before = model(ids).logits
    adapters.bake()
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not any(info.values())
    assert {*again.state_dict()} == {*model.state_dict()} == keys
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (tied and targets == "linear")
    model.tie_weights()  # of other hands: what has become two stays two
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_encoder_decoder_that_cannot_be_untied_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets="head"))
    with pytest.raises(errors.NotMergeableError, match="are one weight"):
        adapters.bake()
    adapters.remove("x")
    adapters.add("x", ak.LoRA(rank=2, targets="attn.*"))
    adapters.bake()
    assert model.lm_head.weight is model.shared.weight


def test_a_vision_transformer_of_timm(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    sizes: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, plain = VisionTransformer(**sizes).eval(), VisionTransformer(**sizes).eval()
    adapters = ak.Adapters(model)
    adapters.add("x", ak.LoRA(rank=2, targets="attn.{q,v} mlp.* head"))
    randomize(adapters, "x")
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    adapters.bake()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(plain(images), model(images))
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_a_pipeline_is_saved_and_read_again(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    base = "examples/digits/base"
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None).to(torch.float32)
    adapters = ak.Adapters(pipe)
    adapters.add("x", ak.LoRA(rank=2, targets="{attn,cross,mlp,res}.*"))
    randomize(adapters, "x")
    keys = {name: {*part.state_dict()} for name, part in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder))}
    keys = {name: {key for key in own if "adapterkit" not in key} for name, own in keys.items()}

    def out(pipe: Any) -> Tensor:
        with torch.no_grad():
            text = pipe.encode_prompt(["a handwritten three"], "cpu", 1, False)[0]
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            return pipe.unet(noise, torch.tensor(300), text).sample

    before = out(pipe)
    adapters.bake()
    torch.testing.assert_close(out(pipe), before, rtol=1e-3, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert {*again.unet.state_dict()} == keys["unet"]
    assert {*again.text_encoder.state_dict()} == keys["text_encoder"]
    assert torch.equal(out(again), out(pipe))
