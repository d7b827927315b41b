"""Prompts against the same model given the longer sequence, with caches, padding and routes; and against PEFT."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.test_handle import randomize

t = pytest.importorskip("transformers")
IDS = toys.ids(batch=3, length=6)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 11}


def decoder(name: str) -> Any:
    torch.manual_seed(0)
    made = {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=1)),
        "Qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)),
        "Gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8)),
        "Mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)),
        "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11)),
        "OPT": lambda: t.OPTForCausalLM(
            t.OPTConfig(hidden_size=16, ffn_dim=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=11,
                        word_embed_proj_dim=16, max_position_embeddings=64)
        ),
        "NeoX": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)),
    }  # fmt: skip
    return made[name]().eval()


DECODERS = ("Llama", "Qwen3", "Gemma2", "GPT2", "OPT", "NeoX", "Mixtral")


def prompted(model: Any, length: int = 3, **options: Any) -> tuple[ak.Adapters, Tensor]:
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=length, **options))
    randomize(adapters, "p")
    [module] = adapters.modules("p").values()
    return adapters, module.lengthen(torch.zeros(1, 1, 16)).detach()  # type: ignore[operator]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_it_is_the_model_on_the_longer_sequence(name: str) -> None:
    model = decoder(name)
    base = model(IDS).logits
    adapters, prompt = prompted(model)
    y = model(IDS, labels=IDS)
    with adapters.disabled():
        embeds = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        assert close(y.logits, model(inputs_embeds=embeds).logits[:, 3:])
        assert torch.equal(model(IDS).logits, base)
    assert y.logits.shape == base.shape
    y.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters("p"))
    adapters.detach()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_is_uncached_generation(name: str) -> None:
    model = decoder(name)
    prompted(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **settings))
    assert cached.shape == (3, 12)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], dim=1)
    wide = torch.cat([torch.zeros(3, 2, dtype=torch.long), mask], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=wide, **settings)[:, 2:], cached)


def test_two_prompts_and_rows_of_their_own() -> None:
    model = decoder("Llama").double()
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 7)
    adapters.add("lora", ak.LoRA(targets="attn.q"))
    randomize(adapters, "lora")
    routes = ["p", None, "q"]
    with adapters.routed(routes), torch.no_grad():
        together = model(IDS).logits
    for i, route in enumerate(routes):
        with adapters.activated(route), torch.no_grad():
            alone = model(IDS[i : i + 1]).logits[0]
        assert torch.allclose(together[i], alone, rtol=1e-9, atol=1e-9)
    with adapters.activated(["p", "q"]):
        both = model(IDS).logits
    with adapters.activated("p"):
        assert not close(both, model(IDS).logits)


@pytest.mark.parametrize("reparam", ["mlp", "lstm"])
def test_p_tuning(reparam: str) -> None:
    model = decoder("Llama")
    adapters, prompt = prompted(model, reparam=reparam, width=8)
    y = model(IDS).logits
    [module] = adapters.modules("p").values()
    h = module.embedding  # type: ignore[union-attr]
    if reparam == "lstm":
        h = module.lstm(h[None])[0][0]  # type: ignore[operator,union-attr]
    assert close(module.mlp(h), prompt)  # type: ignore[operator,union-attr]
    with adapters.disabled():
        embeds = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        assert close(y, model(inputs_embeds=embeds).logits[:, 3:])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = decoder("Llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    nn.init.normal_(weight)
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    [module] = adapters.modules("p").values()
    module.prompt.data.copy_(weight.data)  # type: ignore[union-attr,operator]
    mask = torch.ones_like(IDS)
    assert close(model(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits[:, 3:])


def test_copies_and_files(tmp_path: Any) -> None:
    model = decoder("Llama")
    adapters, _ = prompted(model)
    model.requires_grad_(False)
    y = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, y)
    path = adapters.save("p", tmp_path / "p.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("p")
    model.requires_grad_(False)
    assert torch.equal(model(IDS).logits, y)


def test_what_cannot_be() -> None:
    model = decoder("Llama")
    adapters, _ = prompted(model)
    with pytest.raises(errors.ConfigError, match="its weight must be 1"):
        adapters.activate({"p": 0.5})
    with adapters.disabled():
        cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(errors.StateError, match="filled while other adapters acted"):
        model(IDS[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 7))
    with pytest.raises(errors.StateError, match="two-dimensional"):
        model(IDS, attention_mask=torch.zeros(3, 1, 6, 6))
    with pytest.raises(errors.StateError, match="cache that grows"):
        model.generate(
            IDS, attention_mask=torch.ones_like(IDS), cache_implementation="static", max_new_tokens=2, pad_token_id=0
        )
    bert = t.BertModel(t.BertConfig(**SMALL))
    with pytest.raises(errors.IncompatibleTargetError, match="tokens"):
        ak.Adapters(bert).add("p", ak.Prompt(targets="tokens"))
    with pytest.raises(errors.ConfigError, match="length"):
        ak.Prompt(length=0)
    with pytest.raises(errors.ConfigError, match="Did you mean 'lstm'"):
        ak.Prompt(reparam="lsm")


# -- vision transformers --------------------------------------------------------------------------------------------


def timm_vit() -> Any:
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).double().eval()


IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_shallow_prompts_go_through_all_blocks() -> None:
    model = timm_vit()
    base = model(IMAGES)
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    randomize(adapters, "p")
    y = model(IMAGES)
    [module] = adapters.modules("p").values()
    with adapters.disabled():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
        x = torch.cat([x[:, :1], module.prompt.expand(2, -1, -1), x[:, 1:]], dim=1)  # type: ignore[union-attr,operator]
        for block in model.blocks:
            x = block(x)
        x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
        assert torch.allclose(y, model.forward_head(model.norm(x)), rtol=1e-9, atol=1e-9)
    adapters.detach()
    assert torch.equal(model(IMAGES), base)


def test_deep_prompts_are_each_blocks_own() -> None:
    model = timm_vit()
    adapters = ak.Adapters(model)
    report = adapters.add("p", ak.Prompt(length=3, targets="prompt.layer"))
    assert report.points == {"prompt.layer": 2}
    randomize(adapters, "p")
    y = model(IMAGES)
    prompts = [module.prompt for module in adapters.modules("p").values()]
    with adapters.disabled():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
        for block, prompt in zip(model.blocks, prompts, strict=True):
            x = block(torch.cat([x[:, :1], prompt.expand(2, -1, -1), x[:, 1:]], dim=1))  # type: ignore[operator]
            x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
        assert torch.allclose(y, model.forward_head(model.norm(x)), rtol=1e-9, atol=1e-9)


def test_deep_prompts_of_transformers() -> None:
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    model = t.ViTForImageClassification(t.ViTConfig(**small, image_size=32, patch_size=8)).double().eval()
    base = model(IMAGES).logits
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3, targets="prompt.layer"))
    randomize(adapters, "p")
    y = model(IMAGES, output_hidden_states=True)
    assert not torch.allclose(y.logits, base)
    assert {h.shape[1] for h in y.hidden_states} == {17}
    y.logits.sum().backward()
    assert all(p.grad is not None for p in adapters.parameters("p"))
    adapters.detach()
    assert torch.equal(model(IMAGES).logits, base)


def test_blocks_without_a_mask_have_no_rows_of_their_own() -> None:
    adapters = ak.Adapters(timm_vit())
    adapters.add("p", ak.Prompt(length=3))
    with pytest.raises(errors.RoutingError, match="there is no mask"):
        adapters.routed(["p", None]).__enter__()


def test_a_stack_that_is_passed_by_offers_no_prompt() -> None:
    model = timm_vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(errors.IncompatibleTargetError):
        ak.Adapters(model).add("p", ak.Prompt(targets="tokens"))
    assert "prompt" not in {point.role for point in ak.points(model)}
    assert "prompt.layer" in {point.role for point in ak.points(model)}
