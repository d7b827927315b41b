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
from tests.backends import multimodal_models as models
from tests.values import randomize

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
        "Mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=11, state_size=4)
        ),
        "Bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=11)),
        "Falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL)),
        "Falcon alibi": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, alibi=True)),
        "Mpt": lambda: t.MptForCausalLM(t.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=11, max_seq_len=64)),
    }  # fmt: skip
    return made[name]().eval()


DECODERS = (
    "Llama",
    "Qwen3",
    "Gemma2",
    "GPT2",
    "OPT",
    "NeoX",
    "Mixtral",
    "Bloom",
    "Falcon",
    "Falcon alibi",
    "Mpt",
    "Mamba",
)


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


@pytest.mark.parametrize("name", ["Llama", "Mpt", "Falcon alibi", "Mamba"])
def test_two_prompts_and_rows_of_their_own(name: str) -> None:
    model = decoder(name)  # in double precision transformers' MPT gives NaN where a row is padded
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 7)
    adapters.add("lora", ak.LoRA(targets="embed.tokens"))
    randomize(adapters, "lora")
    routes = ["p", None, "q"]
    with adapters.routed(routes), torch.no_grad():
        together = model(IDS).logits
    for i, route in enumerate(routes):
        with adapters.activated(route), torch.no_grad():
            alone = model(IDS[i : i + 1]).logits[0]
        assert close(together[i], alone)
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


@pytest.mark.parametrize("before", [True, False])
def test_shallow_prompts_and_checkpointed_blocks(before: bool) -> None:
    model = timm_vit()
    if before:
        model.set_grad_checkpointing(True)
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    randomize(adapters, "p")
    [parameter] = adapters.parameters("p")
    results = []
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        y = model.train()(IMAGES)
        (grad,) = torch.autograd.grad(y.sum(), parameter)
        results.append((y, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12)


def test_intermediate_layers_see_shallow_prompts() -> None:
    model = timm_vit()
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    randomize(adapters, "p")
    [last] = model.forward_intermediates(IMAGES, indices=[1], norm=True, intermediates_only=True, output_fmt="NLC")
    assert torch.equal(last, model.forward_features(IMAGES)[:, 1:])
    with adapters.disabled():
        assert not torch.allclose(last, model.forward_features(IMAGES)[:, 1:])


def hf_vit() -> Any:
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return t.ViTForImageClassification(t.ViTConfig(**small, image_size=32, patch_size=8)).double().eval()


def test_shallow_prompts_of_transformers() -> None:
    model = hf_vit()
    base = model(IMAGES).logits
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "p")
    randomize(adapters, "q", 5)
    adapters.activate(["p", "q"])
    seen = model(IMAGES, output_hidden_states=True)
    assert {h.shape[1] for h in seen.hidden_states} == {17}
    y = seen.logits
    prompts = [module.prompt for name in "pq" for module in adapters.modules(name).values()]
    with adapters.disabled():
        vit = model.vit
        x = vit.embeddings(IMAGES)
        x = torch.cat([x, *[prompt.expand(2, -1, -1) for prompt in prompts]], dim=1)  # type: ignore[union-attr,operator]
        for layer in vit.layers:
            x = layer(x)
        assert torch.allclose(y, model.classifier(vit.layernorm(x[:, :17])[:, 0]), rtol=1e-9, atol=1e-9)
        assert torch.equal(model(IMAGES).logits, base)
    adapters.detach()
    assert torch.equal(model(IMAGES).logits, base)
    assert not model.vit.layernorm._forward_pre_hooks


def test_prompts_beside_what_changes_the_sequence() -> None:
    model = hf_vit()
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3))
    adapters.add("i", ak.Invertible(targets="tokens"))
    randomize(adapters, "p")
    randomize(adapters, "i", 3)
    alone = []
    for choice in ("p", "i", ["p", "i"], ["i", "p"]):
        adapters.activate(choice)
        alone.append(model(IMAGES).logits)
    assert torch.equal(alone[2], alone[3])
    assert not torch.allclose(alone[2], alone[0])
    assert not torch.allclose(alone[2], alone[1])


# -- encoders -------------------------------------------------------------------------------------------------------


def encoder(name: str, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    small = {**SMALL, "attn_implementation": implementation}
    vision = {key: value for key, value in small.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    made = {
        "Bert": lambda: t.BertForSequenceClassification(t.BertConfig(**small)),
        "Roberta": lambda: t.RobertaModel(t.RobertaConfig(**small, pad_token_id=0)),
        "Clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**vision)),
        "Siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**vision)),
        "Dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**vision)),
        "Dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**vision, num_register_tokens=2)),
        "Vit": lambda: t.ViTModel(t.ViTConfig(**vision)),
    }  # fmt: skip
    return made[name]().double().eval()


def outcome(model: Any, x: Tensor, **given: Any) -> Tensor:
    y = model(x, **given)
    return y.logits if hasattr(y, "logits") else y.last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Clip", "Siglip", "Dinov2"])
def test_encoders_see_prompts_after_their_embeddings(name: str, implementation: str) -> None:
    """AdapterHub's equation: the prompt stands beside what the embeddings give, and the output is the tokens'."""
    model = encoder(name, implementation)
    x = torch.cat([IMAGES, IMAGES[:1] * 2]) if name in ("Clip", "Siglip", "Dinov2") else IDS
    base = outcome(model, x)
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 5)
    adapters.activate("p")
    [prompt] = [module.prompt.detach() for module in adapters.modules("p").values()]  # type: ignore[union-attr,operator]
    stack = next(module for path, module in model.named_modules() if path.endswith("encoder"))
    y = outcome(model, x)
    assert not torch.allclose(y, base)

    def by_hand(module: Any, args: Any, kwargs: Any) -> Any:
        first = "inputs_embeds" if "inputs_embeds" in kwargs else None
        h = kwargs[first] if first else args[0]
        longer = torch.cat([prompt.expand(len(h), -1, -1), h], dim=1)
        return ((), {**kwargs, first: longer}) if first else ((longer, *args[1:]), {**kwargs, "attention_mask": None})

    def cut(module: Any, args: Any, result: Any) -> Any:
        return type(result)(last_hidden_state=result.last_hidden_state[:, 3:])

    with adapters.disabled():
        hooks = [stack.register_forward_pre_hook(by_hand, with_kwargs=True), stack.register_forward_hook(cut)]
        near = 1e-9 if implementation == "sdpa" else 1e-5  # eager attention takes its softmax in single precision
        assert torch.allclose(y, outcome(model, x), rtol=near, atol=near)
        for hook in hooks:
            hook.remove()
    routes = ["p", None, "q"]
    with adapters.routed(routes):
        together = outcome(model, x)
    for i, route in enumerate(routes):
        with adapters.activated(route):
            assert torch.allclose(together[i], outcome(model, x[i : i + 1])[0], rtol=near, atol=near)


VISION = ("Clip", "Siglip", "Dinov2", "Dinov3", "Vit")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Bert", *VISION])
def test_deep_prompts_of_encoders(name: str, implementation: str) -> None:
    """VPT's equation: every block has tokens of its own beside those that it is given, and they go no further."""
    model = encoder(name, implementation)
    x = torch.cat([IMAGES, IMAGES[:1] * 2]) if name in VISION else IDS
    base = outcome(model, x)
    adapters = ak.Adapters(model)
    for i, (key, length) in enumerate((("p", 3), ("q", 2))):
        assert adapters.add(key, ak.Prompt(length=length, targets="prompt.layer")).points == {"prompt.layer": 2}
        randomize(adapters, key, i)
    adapters.activate("p")
    y = outcome(model, x)
    assert not torch.allclose(y, base)
    near = 1e-9 if implementation == "sdpa" else 1e-5
    with adapters.disabled():
        hooks = []
        for point in ak.points(model, "prompt.layer"):
            prompt = adapters.modules("p")[point.id].prompt.detach()  # type: ignore[union-attr,operator]

            def longer(module: Any, args: Any, kwargs: Any, prompt: Tensor = prompt) -> Any:
                kwargs = {**kwargs, **({"attention_mask": None} if "attention_mask" in kwargs else {})}
                rest = [None if isinstance(one, Tensor) else one for one in args[1:]]
                return (torch.cat([prompt.expand(len(args[0]), -1, -1), args[0]], dim=1), *rest), kwargs

            block = model.get_submodule(point.path)
            hooks += [
                block.register_forward_pre_hook(longer, with_kwargs=True),
                block.register_forward_hook(lambda module, args, result: result[:, 3:]),
            ]
        assert torch.allclose(y, outcome(model, x), rtol=near, atol=near)
        for hook in hooks:
            hook.remove()
    routes = ["p", None, "q"]
    with adapters.routed(routes):
        together = outcome(model, x)
    for i, route in enumerate(routes):
        with adapters.activated(route):
            assert torch.allclose(together[i], outcome(model, x[i : i + 1])[0], rtol=near, atol=near)


def test_prompts_before_rotary_patches() -> None:
    model = encoder("Dinov3")
    base = outcome(model, IMAGES)
    adapters, _ = prompted(model)
    [prompt] = [module.prompt.detach() for module in adapters.modules("p").values()]  # type: ignore[union-attr,operator]
    y = outcome(model, IMAGES)
    with adapters.disabled():
        h = torch.cat([prompt.expand(2, -1, -1), model.embeddings(IMAGES)], dim=1)
        h = model.model(h, position_embeddings=model.rope_embeddings(IMAGES)).last_hidden_state
        assert torch.allclose(y, model.norm(h[:, 3:]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(y, base)
    with pytest.raises(errors.RoutingError, match="there is no mask"):
        adapters.routed(["p", None]).__enter__()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_encoders_and_padding(implementation: str) -> None:
    model = encoder("Bert", implementation)
    prompted(model)
    mask = torch.ones_like(IDS)
    wide = torch.cat([IDS, torch.zeros(3, 2, dtype=torch.long)], dim=1)
    padded = torch.cat([mask, torch.zeros(3, 2, dtype=torch.long)], dim=1)
    y = model(IDS, output_attentions=implementation == "eager", output_hidden_states=True)
    assert torch.allclose(y.logits, model(wide, attention_mask=padded).logits, rtol=1e-9, atol=1e-9)
    assert {h.shape[1] for h in y.hidden_states} == {6}
    if implementation == "eager":
        assert {a.shape[-2:] for a in y.attentions} == {(6, 9)}
    causal = t.BertLMHeadModel(t.BertConfig(**SMALL, is_decoder=True))
    assert "prompt" not in {point.role for point in ak.points(causal)}


@pytest.mark.parametrize("name", ["ModernBert", "Deberta", "Deberta new head"])
def test_encoders_whose_positions_are_relative(name: str) -> None:
    """Their prompts stand before the tokens: at the inputs of the embeddings' norm, as PEFT's do."""
    torch.manual_seed(0)
    modern = {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}
    modern |= dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    model = {
        "ModernBert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**SMALL, **modern)),
        "Deberta": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**SMALL, **relative)),
        "Deberta new head": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**SMALL, **relative, legacy=False)),
    }[name]()
    model.double().eval()
    base = model(IDS).logits
    adapters, _ = prompted(model)
    [prompt] = [module.prompt.detach() for module in adapters.modules("p").values()]  # type: ignore[union-attr,operator]
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 5)
    adapters.activate("p")
    y = model(IDS).logits
    assert not torch.allclose(y, base)
    with adapters.disabled():
        embeds = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        assert torch.allclose(y, model(inputs_embeds=embeds).logits[:, 3:], rtol=1e-9, atol=1e-9)
    zeros = torch.zeros(3, 2, dtype=torch.long)
    mask = torch.cat([torch.ones_like(IDS), zeros], dim=1)
    padded = model(torch.cat([IDS, zeros], dim=1), attention_mask=mask).logits
    assert torch.allclose(padded[:, :6], y, rtol=1e-9, atol=1e-9)
    routes = ["p", None, "q"]
    with adapters.routed(routes):
        together = model(IDS).logits
    for i, route in enumerate(routes):
        with adapters.activated(route):
            assert torch.allclose(together[i], model(IDS[i : i + 1]).logits[0], rtol=1e-9, atol=1e-9)


# -- what a review found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_row_is_the_unpadded_row(name: str) -> None:
    model = decoder(name)
    given = {"position_ids": torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]])} if name == "GPT2" else {}
    prompted(model)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert close(model(padded, attention_mask=mask, **given).logits[:, 2:], model(IDS[:1]).logits)


def test_rows_of_their_own_in_a_sliding_window() -> None:
    torch.manual_seed(0)
    config = t.MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=4)
    model = t.MistralForCausalLM(config).double().eval()
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 7)
    routes = ["p", None, "q"]
    with adapters.routed(routes):
        together = model(IDS).logits
    for i, route in enumerate(routes):
        with adapters.activated(route):
            assert torch.allclose(together[i], model(IDS[i : i + 1]).logits[0], rtol=1e-9, atol=1e-9)


def test_kinds_of_tokens_and_routers() -> None:
    model = decoder("GPT2")
    prompted(model)
    assert model(IDS, token_type_ids=torch.ones_like(IDS)).logits.shape == (3, 6, 11)
    model = decoder("Mixtral")
    prompted(model)
    y = model(IDS, labels=IDS, attention_mask=torch.ones_like(IDS), output_router_logits=True)
    assert {logits.shape for logits in y.router_logits} == {(18, 2)}
    assert y.aux_loss.isfinite()


def test_weights_inside_expressions() -> None:
    model = decoder("Llama")
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 7)
    adapters.activate("p")
    y = model(IDS).logits
    adapters.activate(ak.Average("p", "p"))
    assert torch.equal(model(IDS).logits, y)
    for wrong in (ak.Average("p", "q"), ak.Parallel("p", "p"), ak.Stack("p", "p"), ["p", ak.Parallel("p", "q")]):
        with pytest.raises(errors.ConfigError, match="acts or does not"):
            adapters.activate(wrong)
    with adapters.routed([ak.Parallel("p", "q"), "p", None]):
        together = model(IDS).logits
    with adapters.activated("p"):
        assert close(together[1], model(IDS).logits[1])


def test_a_union_with_a_prompt() -> None:
    model = decoder("Llama")
    adapters = ak.Adapters(model)
    adapters.add("u", ak.Union((ak.Prompt(length=3), ak.LoRA(targets="attn.q"))))
    adapters.add("p", ak.Prompt(length=3))
    randomize(adapters, "p")
    [mine] = adapters.modules("p").values()
    adapters.modules("u")["prompt@language"].members["0"].prompt.data.copy_(mine.prompt)  # type: ignore[union-attr,operator,index]
    adapters.activate("u")
    y = model(IDS).logits
    adapters.activate("p")
    assert close(model(IDS).logits, y)
    with pytest.raises(errors.ConfigError, match="its weight must be 1"):
        adapters.activate({"u": 0.5})


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_prompts_of_a_tower(tower: str) -> None:
    model = models.build("llava").eval()
    base = models.see(model)
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(targets=f"prompt@tower={tower}"))
    randomize(adapters, "p")
    y = models.see(model)
    assert y.shape == base.shape
    assert not close(y, base)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("reparam", ["mlp", "lstm"])
def test_p_tuning_is_that_of_peft(reparam: str) -> None:
    peft = pytest.importorskip("peft")
    model = decoder("Llama")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_reparameterization_type=reparam.upper(),
        encoder_hidden_size=8,
        encoder_dropout=0.0,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    network = theirs.prompt_encoder["default"]
    adapters = ak.Adapters(model)
    adapters.add("p", ak.Prompt(length=3, reparam=reparam, width=8))
    [module] = adapters.modules("p").values()
    module.embedding.data.copy_(network.embedding.weight.data)  # type: ignore[union-attr,operator]
    module.mlp.load_state_dict(network.mlp_head.state_dict())  # type: ignore[union-attr,operator]
    if reparam == "lstm":
        module.lstm.load_state_dict(network.lstm_head.state_dict())  # type: ignore[union-attr,operator]
    mask = torch.ones_like(IDS)
    assert close(model(IDS, attention_mask=mask).logits, theirs(IDS, attention_mask=mask).logits[:, 3:])


# -- encoders and decoders ------------------------------------------------------------------------------------------


def seq2seq(name: str) -> Any:
    torch.manual_seed(0)
    small = {"d_model": 16, "vocab_size": 11, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    t5 = {**small, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    bart = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "bos_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    made = {
        "T5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "UMT5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**t5)),
        "Bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**small, **bart, **heads)),
        "Marian": lambda: t.MarianMTModel(t.MarianConfig(**{**small, **bart, **heads, "pad_token_id": 10})),
    }
    return made[name]().double().eval()


SEQ2SEQ = ("T5", "UMT5", "Bart")
TARGETS = toys.ids(batch=3, length=4, seed=9)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_decoders_attend_to_prompts_as_those_of_peft(name: str, masked: bool) -> None:
    peft = pytest.importorskip("peft")
    model = seq2seq(name)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    nn.init.normal_(weight)
    adapters = ak.Adapters(model)
    assert adapters.add("p", ak.Prompt(length=3)).points == {"prompt": 1}
    [module] = adapters.modules("p").values()
    module.prompt.data = weight.data.clone()  # type: ignore[union-attr]
    given = {"input_ids": IDS, "labels": TARGETS}
    if masked:
        given["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    y = model(**given)
    assert torch.allclose(y.logits, theirs(**given).logits, rtol=1e-9, atol=1e-9)
    assert y.encoder_last_hidden_state.shape[1] == 9
    y.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters("p"))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_generates_behind_a_prompted_encoder(name: str, settings: dict[str, int]) -> None:
    model = seq2seq(name)
    adapters, _ = prompted(model)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    together = model.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(model.generate(IDS, attention_mask=mask, use_cache=False, **settings), together)
    for i in range(3):
        length = int(mask[i].sum())
        assert torch.equal(model.generate(IDS[i : i + 1, :length], **settings)[0], together[i])
    with adapters.disabled():
        states = model.get_encoder()(IDS)
    with pytest.raises(errors.StateError, match="run the encoder again"):
        model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=TARGETS)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_rows_of_their_own_in_an_encoder(name: str) -> None:
    model = seq2seq(name)
    adapters, _ = prompted(model)
    adapters.add("q", ak.Prompt(length=2))
    randomize(adapters, "q", 7)
    routes = ["p", None, "q"]
    with adapters.routed(routes):
        together = model(input_ids=IDS, decoder_input_ids=TARGETS).logits
    for i, route in enumerate(routes):
        with adapters.activated(route):
            alone = model(input_ids=IDS[i : i + 1], decoder_input_ids=TARGETS[i : i + 1]).logits[0]
        assert torch.allclose(together[i], alone, rtol=1e-9, atol=1e-9)
    copied = copy.deepcopy(model)
    adapters.detach()
    assert not model.get_decoder()._forward_pre_hooks
    other = ak.Adapters(copied)
    other.activate("p")
    assert copied(input_ids=IDS, decoder_input_ids=TARGETS).logits.isfinite().all()
    pickle.loads(pickle.dumps(copied))


def test_an_encoder_that_stands_alone_returns_its_tokens() -> None:
    torch.manual_seed(0)
    model = t.T5EncoderModel(t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=11)).double()
    adapters, _ = prompted(model.eval())
    [prompt] = [module.prompt.detach() for module in adapters.modules("p").values()]  # type: ignore[union-attr,operator]
    y = model(IDS).last_hidden_state
    with adapters.disabled():
        embeds = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        assert torch.allclose(y, model(inputs_embeds=embeds).last_hidden_state[:, 3:], rtol=1e-9, atol=1e-9)
    zeros = torch.zeros(3, 2, dtype=torch.long)
    mask = torch.cat([zeros, torch.ones_like(IDS)], dim=1)
    padded = model(torch.cat([zeros, IDS], dim=1), attention_mask=mask).last_hidden_state
    assert torch.allclose(padded[:, 2:], y, rtol=1e-9, atol=1e-9)
