"""ReFT against its equations, on blocks of every kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


def edited(h: Tensor, edit: nn.Module, form: str) -> Tensor:
    """The paper's equations, with R made orthonormal by a Gram-Schmidt of its own."""
    r = edit.projection.detach().clone()  # type: ignore[operator,union-attr]
    if form == "loreft":
        for i in range(len(r)):
            for j in range(i):
                r[i] -= (r[i] @ r[j]) * r[j]
            r[i] /= r[i].norm()
    low = h @ edit.source.mT + edit.bias  # type: ignore[union-attr,operator]
    return h + (low if form == "direft" else low - h @ r.mT) @ r


@pytest.mark.parametrize("form", ["loreft", "noreft", "direft"])
def test_it_is_its_equation(model: toys.ToyModel, form: str, tmp_path: Path) -> None:
    base = model(X)
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.ReFT(form=form, rank=3))
    assert torch.allclose(model(X), base, atol=1e-5)  # R starts orthonormal in float32
    randomize(adapters, "mine")
    y = model(X)
    edits = [module.first for module in adapters.modules("mine").values()]
    with adapters.disabled():
        h = model.embed(X)
        for block, edit in zip(model.blocks, edits, strict=True):
            h = edited(block(h), edit, form)
        assert close(y, model.head(model.norm(h)))
    path = adapters.save("mine", tmp_path / "mine.safetensors")
    adapters.detach()
    adapters.load(path)  # AdapterHub's DiReFT comes back as NoReFT
    assert adapters.config("mine") == ak.ReFT(form=form, rank=3)
    adapters.activate("mine")
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_ends_are_edited(model: toys.ToyModel, tied: bool) -> None:
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.ReFT(rank=2, prefix=2, suffix=1, tied=tied, targets="hidden@layer=1"))
    randomize(adapters, "mine")
    [module] = adapters.modules("mine").values()
    h = torch.randn(2, 6, 8, dtype=torch.float64)
    y = module(h, lambda x: h)
    last = module.first if tied else module.last
    assert close(y[:, :2], edited(h, module.first, "loreft")[:, :2])  # type: ignore[arg-type]
    assert torch.equal(y[:, 2:5], h[:, 2:5])
    assert close(y[:, 5:], edited(h, last, "loreft")[:, 5:])  # type: ignore[arg-type]
    short = module(h[:, :2], lambda x: h[:, :2])  # nothing is edited twice
    assert close(short, edited(h, module.first, "loreft")[:, :2])  # type: ignore[arg-type]


def test_it_edits_whole_blocks_alone(model: toys.ToyModel) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match="use 'hidden'"):
        ak.Adapters(model).add("mine", ak.ReFT(targets="mlp"))
    with pytest.raises(errors.IncompatibleTargetError, match="at most the width"):
        ak.Adapters(model).add("mine", ak.ReFT(rank=9))
    with pytest.raises(errors.ConfigError, match="Did you mean 'loreft'"):
        ak.ReFT(form="lorefd")


def hidden_states(model: nn.Module, kwargs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(**kwargs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT"])
def test_hidden_states_of_transformers_are_edited(name: str) -> None:
    """Behind the first block: the second's input, as the model itself reports it."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids, images = {"input_ids": X}, {"pixel_values": torch.randn(2, 3, 8, 8)}
    made = {
        "Llama": lambda: (t.LlamaModel(t.LlamaConfig(**small, vocab_size=11)), ids),
        "GPT2": lambda: (t.GPT2Model(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11)), ids),
        "Bert": lambda: (t.BertModel(t.BertConfig(**small, vocab_size=11)), ids),
        "ViT": lambda: (t.ViTModel(t.ViTConfig(**small, image_size=8, patch_size=4)), images),
    }  # fmt: skip
    model, kwargs = made[name]()
    model.double().eval()
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    adapters = ak.Adapters(model)
    before = hidden_states(model, kwargs)
    adapters.add("mine", ak.ReFT(rank=2, targets="hidden@layer=0"))
    randomize(adapters, "mine")
    after = hidden_states(model, kwargs)
    [module] = adapters.modules("mine").values()
    assert torch.equal(after[0], before[0])
    assert close(after[1], edited(before[1], module.first, "loreft"))  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks(reentrant: bool) -> None:
    """Checkpointing runs a block's forward again, without its hooks."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(
        t.LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=11)
    ).double()
    adapters, gradients = ak.Adapters(model), []
    adapters.add("mine", ak.ReFT(rank=2, prefix=2, suffix=2))
    randomize(adapters, "mine")
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=X, labels=X).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in adapters.parameters()])
        for parameter in adapters.parameters():
            parameter.grad = None
    assert len(gradients[0]) > 0
    assert all(close(one, two) for one, two in zip(*gradients, strict=True))


def test_blocks_that_keep_their_sublayers_in_a_list() -> None:
    """T5's block holds a list of sublayers: what is edited is the block's output, not the list's."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=11, decoder_start_token_id=0)
    model = t.T5ForConditionalGeneration(config).double().eval()
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.ReFT(rank=2, targets="hidden@layer=0"))
    randomize(adapters, "mine")
    modules = {point.path: adapters.modules("mine")[point.id] for point in ak.points(model, "hidden@layer=0")}
    assert set(modules) == {"encoder.block.0", "decoder.block.0"}
    kwargs = {"input_ids": X, "decoder_input_ids": X}
    with adapters.disabled():
        before = model.encoder(input_ids=X, output_hidden_states=True).hidden_states
    after = model.encoder(input_ids=X, output_hidden_states=True).hidden_states
    assert torch.equal(after[0], before[0])
    assert close(after[1], edited(before[1], modules["encoder.block.0"].first, "loreft"))  # type: ignore[arg-type]
    assert not close(model(**kwargs).logits, run_base(adapters, model, kwargs))


def run_base(adapters: ak.Adapters, model: nn.Module, kwargs: dict[str, Tensor]) -> Tensor:
    with adapters.disabled():
        return model(**kwargs).logits


def test_blocks_that_change_the_width() -> None:
    """Some of Hiera's blocks pool the tokens and double the width: they are edited at the width that they end in."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=16, num_heads=1)
    model.double().eval()
    adapters, x = ak.Adapters(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    base = model.forward_features(x)
    adapters.add("mine", ak.ReFT(rank=2))
    seen = {}
    for path in ("blocks.0", "blocks.1", "blocks.2", "blocks.3"):
        model.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: seen.__setitem__(path, y.shape[-1]))
    assert torch.allclose(model.forward_features(x), base, atol=1e-5)
    widths = {point.path: point.out_features for point in ak.points(model, "hidden")}
    assert widths == seen
    randomize(adapters, "mine")
    assert not close(model.forward_features(x), base)


def test_timm_blocks() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).double().eval()
    adapters, x = ak.Adapters(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    report = adapters.add("mine", ak.ReFT())
    assert report.points == {"hidden": 2}
    base = model(x)
    randomize(adapters, "mine")
    assert not close(model(x), base)
