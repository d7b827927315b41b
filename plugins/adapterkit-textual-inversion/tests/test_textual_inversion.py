"""Textual inversion: conformance, vectors as in a resized embedding, tokenizers, company, files, pivotal tuning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from adapterkit_textual_inversion import adapterkit_register_adapters
from adapterkit_textual_inversion.inversion import TextualInversion
from adapterkit_textual_inversion.tokens import add_tokens
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance

WORDS = ["[UNK]", "[PAD]", "a", "photo", "of", "cat", "dog", "the"]
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    known = "textual_inversion" in manager.adapters()
    if not known:
        plugin = type("Plugin", (), {"adapterkit_register_adapters": staticmethod(adapterkit_register_adapters)})()
        manager.register(plugin, name="textual_inversion_here")
    yield
    if not known:
        manager.unregister(name="textual_inversion_here")


class TestConformance(AdapterConformance):
    config = TextualInversion(tokens=("<a>", "<b>"), vectors=2, ids=(1, 2, 3, 5), init_ids=(4, 6))


def tokenizer() -> t.PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def llama(rows: int = len(WORDS)) -> t.PreTrainedModel:
    torch.manual_seed(0)
    config = t.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=rows)
    return t.LlamaForCausalLM(config).double().eval()


def ids_of(words: t.PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor([words(text, add_special_tokens=False).input_ids])


def resized(model: nn.Module, rows: dict[int, Tensor]) -> nn.Module:
    """A copy of the model whose embedding has these rows in its own table."""
    other: Any = copy.deepcopy(model)
    ak.Adapters(other).detach()
    table = other.get_input_embeddings()
    weight = torch.cat([table.weight, table.weight.new_zeros(max(0, 1 + max(rows) - len(table.weight)), 16)]).detach()
    for i, row in rows.items():
        weight[i] = row.detach()
    table.weight = nn.Parameter(weight)
    return other


@pytest.mark.parametrize("rows", [len(WORDS), 64])  # the second is padded: new ids are in it
def test_it_is_a_larger_embedding(rows: int) -> None:
    model, words = llama(rows), tokenizer()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = ak.Adapters(model)
    adapters.add("mine", TextualInversion(tokens=("<cat>", "<dog>"), vectors=2, init_ids=(5,)))
    ids = add_tokens(adapters, "mine", words)
    assert ids == {"<cat>": 8, "<cat>#1": 9, "<dog>": 10, "<dog>#1": 11}
    [module] = adapters.modules("mine").values()
    assert torch.equal(module.values, before["model.embed_tokens.weight"][[5, 5, 5, 5]])
    nn.init.normal_(module.values)
    config: Any = adapters.config("mine")
    text = ids_of(words, config.written("a photo of <cat> the <dog>"))
    assert text.tolist() == [[2, 3, 4, 8, 9, 7, 10, 11]]
    expected = resized(model, {8 + i: row for i, row in enumerate(module.values)})(text).logits
    found = model(text).logits
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p is module.values
    ]
    assert (module.values.grad.abs().sum(1) > 0).all()
    adapters.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_several_act_with_others_at_the_embedding_in_any_order() -> None:
    model, words = llama(), tokenizer()
    adapters = ak.Adapters(model)
    for name, word in (("one", "<one>"), ("two", "<two>")):
        adapters.add(name, TextualInversion(tokens=(word,)))
        add_tokens(adapters, name, words)
        nn.init.normal_(next(iter(adapters.modules(name).values())).values)
    adapters.add("lora", ak.LoRA(rank=2, targets="embed.tokens attn.q"))
    for parameter in adapters.parameters("lora"):
        nn.init.normal_(parameter)
    text = ids_of(words, "a <one> of <two> cat")
    rows = {8 + i: next(iter(adapters.modules(name).values())).values[0] for i, name in enumerate(("one", "two"))}
    other = resized(model, rows)
    lora = ak.Adapters(other)
    lora.add("lora", ak.LoRA(rank=2, targets="attn.q"))
    for key, tensor in lora.state_dict("lora").items():
        tensor.copy_(adapters.state_dict("lora")[key])
    delta = adapters.modules("lora")["embed.tokens@language"].delta_weight().mT
    other.get_input_embeddings().weight.data[:8] += 0.5 * delta.detach()
    lora.activate({"lora": 0.5})
    expected = other(text).logits
    for order in (["one", "two", "lora"], ["lora", "two", "one"], ["two", "lora", "one"]):
        adapters.activate({name: 0.5 if name == "lora" else 1.0 for name in order})
        assert torch.allclose(model(text).logits, expected, rtol=1e-10, atol=1e-10), order
    adapters.activate(None)
    with adapters.activated(["one", "two", "lora"]):
        expected = model(text).logits
    for same in (
        [ak.Stack("one", "lora"), "two"],
        [ak.Parallel("lora", "two"), "one"],
        ak.Stack("two", ak.Parallel("one", "lora")),
        [ak.Average("lora", "lora"), ak.Stack("one", "two")],
    ):
        with adapters.activated(same):
            assert torch.allclose(model(text).logits, expected, rtol=1e-10, atol=1e-10), same
    for unsayable in (ak.Average("one", "lora"), ak.Parallel("one", "one")):
        with pytest.raises(errors.ConfigError, match=r"acts around all others|its weight must be 1"):
            adapters.activate(unsayable)
    with adapters.activated(ak.Stack("lora", "one")), pytest.raises(IndexError):
        model(text)  # nobody knows <two> there
    with pytest.raises(errors.ConfigError, match="its weight must be 1, not"):
        adapters.activate({"one": 0.5})
    with pytest.raises(errors.RoutingError, match="cannot be routed"), adapters.routed(["one"]):
        pass


def test_files_and_tokenizers(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    adapters = ak.Adapters(model)
    adapters.add("mine", TextualInversion(tokens=("<cat>",), vectors=2))
    add_tokens(adapters, "mine", words)
    adapters.add("style", ak.LoRA(rank=2, targets="attn.*"))
    for name in ("mine", "style"):
        for parameter in adapters.parameters(name):
            nn.init.normal_(parameter)
    adapters.activate(["mine", "style"])
    text = "the <cat> <cat>#1 photo"
    expected = model(ids_of(words, text)).logits
    path = adapters.save(["mine", "style"], tmp_path / "both.safetensors")

    other, more = llama(), tokenizer()
    more.add_tokens(["<there>", "<before>"])
    again = ak.Adapters(other)
    again.load_all(path)
    again.activate(["mine", "style"])
    assert torch.equal(other(ids_of(words, text)).logits, expected)  # the ids that it was written with
    assert add_tokens(again, "mine", more) == {"<cat>": 10, "<cat>#1": 11}
    assert ids_of(more, text).tolist() == [[7, 10, 11, 3]]
    assert torch.equal(other(ids_of(more, text)).logits, expected)
    size = len(more)
    assert add_tokens(again, "mine", more) == {"<cat>": 10, "<cat>#1": 11}
    assert len(more) == size


def test_clashes_are_errors_and_leave_the_tokenizer_alone() -> None:
    model, words = llama(), tokenizer()
    adapters = ak.Adapters(model)
    adapters.add("own", TextualInversion(tokens=("<new>", "cat")))
    adapters.add("special", TextualInversion(tokens=("[PAD]",)))
    adapters.add("fixed", TextualInversion(tokens=("<f>",), ids=(3,)))
    adapters.add("twin", TextualInversion(tokens=("<f>",)))
    adapters.add("lora", ak.LoRA())
    for name, message in (
        ("own", r"'cat' is a token of the tokenizer's own \(5\)"),
        ("special", r"'\[PAD\]' is a token of the tokenizer's own \(1\)"),
        ("fixed", "'<f>' is a token of 'twin' too"),
        ("lora", "is a LoRA, not a TextualInversion"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            add_tokens(adapters, name, words)
    adapters.remove("twin")
    with pytest.raises(errors.ConfigError, match="'<f>' is 8 in this tokenizer, and the config says 3"):
        add_tokens(adapters, "fixed", words)
    with pytest.raises(errors.ConfigError, match="has no tokens in 'vision'"):
        add_tokens(adapters, "fixed", words, component="vision")
    assert len(words) == len(WORDS)
    with pytest.raises(errors.IncompatibleTargetError, match="it has 8 rows, and init_ids names 8"):
        adapters.add("x", TextualInversion(init_ids=(8,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, "different strings"),
        ({"tokens": ("<a>", "<a>")}, "different strings"),
        ({"tokens": ("a b",)}, "without spaces"),
        ({"tokens": ("<a>", "<a>#1"), "vectors": 2}, "named alike"),
        ({"vectors": 0}, "vectors must be from 1"),
        ({"ids": (1, 2)}, "ids must be 1, one for each vector, not 2"),
        ({"ids": (-1,)}, "whole numbers from 0"),
        ({"init_ids": ()}, "whole numbers from 0"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        TextualInversion(**options)


def test_pivotal_tuning_of_a_pipeline(tmp_path: Path) -> None:
    """Both parts of a tiny Stable Diffusion train on one loss, go into one file, and come back with the same bits."""
    diffusers = pytest.importorskip("diffusers")

    def parts() -> tuple[Any, Any]:
        torch.manual_seed(0)
        text = t.CLIPTextModel(t.CLIPTextConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=8)).eval()
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16, norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ).eval()  # fmt: skip
        return text, unet

    class Pipeline:
        def __init__(self) -> None:
            self.text_encoder, self.unet = parts()
            self.components = {"text_encoder": self.text_encoder, "unet": self.unet}

        def __call__(self, ids: Tensor) -> Tensor:
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            return self.unet(noise, 3, self.text_encoder(ids).last_hidden_state).sample

    pipe, words = Pipeline(), tokenizer()
    adapters = ak.Adapters(pipe)
    adapters.add("cat", TextualInversion(tokens=("<cat>",), vectors=2, init_ids=(5,)))
    add_tokens(adapters, "cat", words)
    adapters.add("style", ak.LoRA(rank=2, targets="cross.*"))
    adapters.train("cat", "style")
    adapters.activate(["cat", "style"])
    text = ids_of(words, "a <cat> <cat>#1")
    groups = [*adapters.parameter_groups("cat", lr=1e-2), *adapters.parameter_groups("style", lr=1e-3)]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(4):
        loss = pipe(text).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    expected = pipe(text)
    path = adapters.save(["cat", "style"], tmp_path / "pivotal.safetensors")
    again = Pipeline()
    loaded = ak.Adapters(again)
    assert list(loaded.load_all(path)) == ["cat", "style"]
    loaded.activate(["cat", "style"])
    add_tokens(loaded, "cat", tokenizer())
    again.text_encoder.requires_grad_(False)
    again.unet.requires_grad_(False)
    assert torch.allclose(again(text), expected, atol=1e-6)
