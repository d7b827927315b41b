"""One adapter for a weight that embedding and head have: unmerged, in both, it is what it is in the one weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import adapterkit as ak
from adapterkit.errors import ConfigError, IncompatibleTargetError
from tests.values import randomize

SIZES = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.arange(12).view(2, 6)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("Llama", "ForCausalLM", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "GPT-2": ("GPT2", "LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "a bias beside": ("Bert", "ForMaskedLM", SIZES),
    "a scale": ("Gemma", "ForCausalLM", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
}
PARTS = {
    "lora": ak.LoRA(rank=2, alpha=3),
    "dropout": ak.LoRA(rank=2, dropout=0.5),
    "dora": ak.DoRA(rank=2),
    "pissa": ak.LoRA(rank=2, init="pissa"),
    "rows": ak.Trainable(rows=(3, 7)),
    "whole": ak.Trainable(part="weight"),
    "union": ak.Union((ak.LoRA(rank=2, targets="embed.tokens"), ak.Trainable(rows=(3,), targets="embed.tokens"))),
}


def built(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, task, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **more})
    return getattr(transformers, f"{kind}{task}")(config).eval()


def adapted(model: Any, part: ak.AdapterConfig = PARTS["lora"]) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Tied(part))
    randomize(adapters, "a")
    return adapters


def weights(model: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """As the modules hold them: where the model reads one, it is given what adapters make of it."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(module._parameters["weight"] for module in both)  # type: ignore[return-value]


def test_points_of_one_weight_know_each_other() -> None:
    tied = {point.id: point.tied for point in ak.points(built("Llama")) if point.tied}
    assert tied == dict.fromkeys(("embed.tokens@language", "head@language"), "embed.tokens@language")
    assert not any(point.tied for point in ak.points(built("Llama", tie_word_embeddings=False)))


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_the_adapter_of_the_one_weight(name: str, part: ak.AdapterConfig) -> None:
    if (name, part) == ("a scale", PARTS["dropout"]):
        pytest.skip("the model reads that weight, which has no dropout")
    model = built(name)
    base = model(IDS).logits
    adapters = adapted(model, part)
    y = model(IDS).logits
    assert not torch.allclose(y, base, atol=1e-3)
    # By hand: what the part makes of the weight that the embedding has, in a model whose head is tied to it.
    reference = built(name)
    module: Any = adapters.modules("a")["embed.tokens@language"]
    embedding = weights(reference)[0]
    embedding.copy_(module.shared.merged(embedding.mT, None)[0].mT)
    torch.testing.assert_close(y, reference(IDS).logits, rtol=1e-4, atol=1e-4)
    before, other = weights(model)
    assert before is other
    with adapters.merged():
        one, other = weights(model)
        assert one is other
        assert one is not before
        torch.testing.assert_close(one, embedding, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)
        model.tie_weights()
        model(IDS)
    assert all(one is before for one in weights(model))
    adapters.detach()
    assert torch.equal(model(IDS).logits, base)


def test_gradients_are_those_of_the_one_weight() -> None:
    model = built("Llama")
    adapters = adapted(model)
    adapters.train("a")
    model(IDS).logits.square().sum().backward()
    (module,) = {id(one.shared): one.shared for one in adapters.modules("a").values()}.values()  # type: ignore[attr-defined]
    a, b = (factor.detach().clone().requires_grad_() for factor in (module.A, module.B))
    reference = built("Llama").requires_grad_(False)
    weight = weights(reference)[0] + module.scale * (b @ a).mT
    names = ("model.embed_tokens.weight", "lm_head.weight")
    logits = torch.func.functional_call(reference, dict.fromkeys(names, weight), (IDS,), tie_weights=False).logits
    logits.square().sum().backward()
    for own, expected in ((module.A, a), (module.B, b)):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-3)
    assert len([*adapters.parameters("a")]) == 2


@pytest.mark.parametrize("part", [PARTS["lora"], PARTS["dora"], PARTS["union"]], ids=["lora", "dora", "union"])
@torch.no_grad()
def test_a_file_gives_it_back(part: ak.AdapterConfig, tmp_path: Path) -> None:
    model = built("GPT-2")
    adapters = adapted(model, part)
    y = model(IDS).logits
    path = adapters.save("a", tmp_path / "a.safetensors")
    other = built("GPT-2")
    again = ak.Adapters(other)
    again.load(path, "b")
    again.activate("b")
    torch.testing.assert_close(other(IDS).logits, y, rtol=0, atol=0)
    assert len({id(one.shared) for one in again.modules("b").values()}) == 1  # type: ignore[attr-defined]
    copied = copy.deepcopy(other)
    torch.testing.assert_close(copied(IDS).logits, y, rtol=0, atol=0)


@pytest.mark.parametrize("part", [PARTS["lora"], PARTS["rows"]], ids=["lora", "rows"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "a scale"])
@torch.no_grad()
def test_it_grows_with_the_vocabulary(name: str, part: ak.AdapterConfig) -> None:
    model = built(name)
    base = model(IDS).logits
    adapters = adapted(model, part)
    y = model(IDS).logits
    model.resize_token_embeddings(40)
    z = model(IDS).logits
    torch.testing.assert_close(z[..., :32], y, rtol=1e-5, atol=1e-5)
    model(torch.full((1, 3), 39))
    with adapters.merged():
        one, other = weights(model)
        assert one is other
        assert len(one) == 40
        torch.testing.assert_close(model(IDS).logits, z, rtol=1e-4, atol=1e-4)
    one, other = weights(model)
    assert one is other
    adapters.detach()
    torch.testing.assert_close(model(IDS).logits[..., :32], base, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_baked_model_is_still_tied(tmp_path: Path) -> None:
    model = built("Llama")
    adapters = adapted(model)
    y = model(IDS).logits
    adapters.bake("a")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert weights(again)[0] is weights(again)[1]
    torch.testing.assert_close(again(IDS).logits, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_row_has_its_own() -> None:
    model = built("Llama")
    adapters = adapted(model)
    adapters.add("b", ak.Tied(ak.LoRA(rank=2)))
    randomize(adapters, "b", seed=1)
    each = []
    for name in "ab":
        with adapters.activated(name):
            each.append(model(IDS).logits)
    with adapters.routed(["b", "a"]):
        y = model(IDS).logits
    torch.testing.assert_close(y, torch.stack([each[1][0], each[0][1]]), rtol=1e-4, atol=1e-4)
    with adapters.activated({"a": 0.5, "b": 2.0}):
        y = model(IDS).logits
        with adapters.merged():
            one, other = weights(model)
            assert one is other
            torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beside_others_in_a_union() -> None:
    model = built("Llama")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Union((ak.LoRA(rank=2, targets="attn.q"), ak.Tied(ak.LoRA(rank=2)))))
    randomize(adapters, "a")
    y = model(IDS).logits
    with adapters.merged():
        one, other = weights(model)
        assert one is other
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beside_an_adapter_of_the_head_alone_a_merge_unties() -> None:
    model = built("Llama")
    adapters = adapted(model)
    adapters.add("head", ak.LoRA(rank=1, targets="head"))
    randomize(adapters, "head")
    adapters.activate(["a", "head"])
    y = model(IDS).logits
    with adapters.merged():
        one, other = weights(model)
        assert one is not other
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)
    one, other = weights(model)
    assert one is other


def test_what_cannot_be_is_told() -> None:
    untied = ak.Adapters(built("Llama", tie_word_embeddings=False))
    with pytest.raises(IncompatibleTargetError, match=r"its weight is no other layer's too"):
        untied.add("a", ak.Tied(ak.LoRA()))
    adapters = ak.Adapters(built("Llama"))
    with pytest.raises(ConfigError, match=r"name all layers that have the weight of embed\.tokens@language"):
        adapters.add("a", ak.Tied(ak.LoRA(), targets="head"))
    with pytest.raises(ConfigError, match="Bottleneck does not act at weights"):
        ak.Tied(ak.Bottleneck())
    with pytest.raises(ConfigError, match="starts from the inputs of one layer"):
        ak.Tied(ak.LoRA(init="eva"))
    with pytest.raises(IncompatibleTargetError, match=r"cannot act at embed\.tokens@language"):
        adapters.add("a", ak.Tied(ak.Invertible()))
    with pytest.raises(IncompatibleTargetError, match=r"its weight is no other layer's too"):
        ak.Adapters(nn.Sequential(nn.Linear(2, 2))).add("a", ak.Tied(ak.LoRA()))
    assert not adapters.report().adapters
