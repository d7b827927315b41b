"""Trainable: the model's own parameters as an adapter, against the plain model and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ("attn.v mlp.* conv", "all"),
        ("mlp.up conv norm", "weight"),
        ("all norm", "bias"),
        ("norm", "all"),
        ("embed.tokens", "all"),
    ],
)
def test_it_is_the_model_with_these_parameters(model: toys.ToyModel, targets: str, part: str) -> None:
    """Changed in the adapter, or written into the model: the same output."""
    plain, base = copy.deepcopy(model), model(X)
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.Trainable(targets, part=part))
    assert torch.equal(model(X), base) or close(model(X), base)
    randomize(adapters, "mine")
    points = {point.id: point for point in adapters.points()}
    for key, module in adapters.modules("mine").items():
        layer: Any = plain.get_submodule(points[key].path)
        rows = slice(None) if points[key].span is None else slice(points[key].span.start, points[key].span.start + 8)  # type: ignore[union-attr]
        with torch.no_grad():
            if part == "bias":
                layer.bias[rows] += module.shift
                continue
            weight = module.weight.mT if key.startswith("embed") else module.weight  # type: ignore[union-attr]
            if key.startswith("embed"):
                layer.weight = nn.Parameter(weight.clone())  # the head, tied to it, keeps its own
            else:
                layer.weight[rows] = weight
            if module.bias is not None:
                layer.bias[rows] = module.bias
    assert close(model(X), plain(X))
    with adapters.merged():
        assert close(model(X), plain(X))


def test_biases_are_those_that_there_are(model: toys.ToyModel) -> None:
    report = ak.Adapters(model).add("bias", ak.Trainable("all norm", part="bias"))
    assert "mlp.down" not in report.points  # it has none
    assert report.points["norm"] == 5
    with pytest.raises(errors.IncompatibleTargetError, match=r"none of the 2 points that 'mlp\.down' names"):
        ak.Adapters(model).add("none", ak.Trainable("mlp.down", part="bias"))


def test_single_rows_of_an_embedding_and_its_tied_head(model: toys.ToyModel, tmp_path: Path) -> None:
    adapters, base = ak.Adapters(model), model(X)
    adapters.add("rows", ak.Trainable("embed.tokens head", rows=(3, 5)))
    assert sum(p.numel() for p in adapters.parameters("rows")) == 2 * 2 * toys.WIDTH
    assert close(model(X), base)
    randomize(adapters, "rows")
    y = model(X)
    plain = copy.deepcopy(model)
    ak.Adapters(plain).detach()
    plain.head.weight = nn.Parameter(plain.head.weight.clone())
    for key, layer in (("embed.tokens@toy", plain.embed), ("head@toy", plain.head)):
        layer.weight.data[[3, 5]] = adapters.modules("rows")[key].values.data  # type: ignore[union-attr,operator,index]
    assert close(y, plain(X))
    untouched = torch.full((1, 4), 2)
    with adapters.disabled():
        logits = model(untouched)
    assert close(model(untouched)[..., [0, 1, 2, 4]], logits[..., [0, 1, 2, 4]])
    with adapters.merged():
        assert close(model(X), y)
    path = adapters.save("rows", tmp_path / "rows.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("rows")
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("outputs", [3, toys.VOCABULARY + 4])
def test_a_new_head_of_another_size(model: toys.ToyModel, tmp_path: Path, outputs: int) -> None:
    adapters, base = ak.Adapters(model), model(X)
    adapters.add("classes", ak.Trainable("head", outputs=outputs))
    y = model(X)
    assert y.shape == (3, 5, outputs)
    with adapters.merged():
        assert close(model(X), y)
        assert model.embed.weight.shape == (toys.VOCABULARY, toys.WIDTH)  # tied to the head, and left as it is
    assert torch.equal(model(X), y)
    with adapters.disabled():
        assert torch.equal(model(X), base)
    path = adapters.save("classes", tmp_path / "classes.safetensors")
    adapters.detach()
    assert torch.equal(model(X), base)
    adapters.load(path)
    adapters.activate("classes")
    assert torch.equal(model(X), y)
    with pytest.raises(errors.ConfigError, match=r"its weight must be 1, not 0\.5"):
        adapters.activate({"classes": 0.5})
    with pytest.raises(errors.RoutingError, match="it replaces the base"):
        adapters.routed(["classes", None, None]).__enter__()


def test_norms_of_every_library_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GemmaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=2, vocab_size=11,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config).double().eval()
    adapters, base = ak.Adapters(model), model(X).logits
    report = adapters.add("norms", ak.Trainable("norm@layer=1"))
    assert report.points == {"norm": 2}  # the last norm of the model lies in no layer
    assert close(model(X).logits, base)
    for module in adapters.modules("norms").values():
        module.weight.data += 1.0  # type: ignore[union-attr,operator]
    y = model(X).logits
    adapters.detach()
    for name in ("input_layernorm", "post_attention_layernorm"):
        model.model.layers[1].get_submodule(name).weight.data += 1.0  # Gemma's gain is 1 + weight
    assert close(model(X).logits, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "biases"}, "Did you mean 'bias'"),
        ({"rows": (1, 1)}, "different whole numbers"),
        ({"rows": (-1,)}, "different whole numbers"),
        ({"rows": (1,), "outputs": 3}, "rows goes with neither"),
        ({"outputs": 0}, "outputs must be from 1"),
        ({"outputs": 3, "part": "bias"}, "part must be 'all'"),
        ({"init": "zero"}, "init must be one of"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        ak.Trainable(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ak.Trainable("conv", rows=(1,)), "this is a conv"),
        (ak.Trainable("embed.tokens", rows=(11,)), "it has 11 rows, and row 11 is asked for"),
        (ak.Trainable("mlp.up", outputs=3), "only a head can have another number"),
    ],
)
def test_wrong_places(model: toys.ToyModel, config: ak.Trainable, message: str) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match=message):
        ak.Adapters(model).add("mine", config)


# -- PEFT -----------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head, self.aux_head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x).relu())
        return self.head(h) + self.aux_head(h)


def test_the_head_is_not_the_other_head() -> None:
    """PEFT's `modules_to_save=["head"]` trains `aux_head` too."""
    adapters = ak.Adapters(Heads(), roles={"head": "head"})
    adapters.add("mine", ak.Trainable("head"))
    assert list(adapters.modules("mine")) == ["head@model.head"] or list(adapters.modules("mine")) == ["head@model"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_norm_tuning_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Heads().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["norm"])).eval()
    layer = theirs.base_model.model.norm.ln_tuning_layers["default"]
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    adapters = ak.Adapters(base)
    adapters.add("mine", ak.Trainable("norm"))
    [module] = adapters.modules("mine").values()
    module.load_state_dict({"weight": layer.weight.data, "bias": layer.bias.data})
    x = torch.randn(4, 6)
    assert torch.allclose(base(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_token_rows_are_those_of_peft() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 11,
    }
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 5])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    delta = theirs.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    nn.init.normal_(delta)
    adapters = ak.Adapters(base)
    adapters.add("mine", ak.Trainable("embed.tokens", rows=(3, 5)))
    [module] = adapters.modules("mine").values()
    module.values.data.copy_(delta.data)  # type: ignore[union-attr,operator]
    assert torch.allclose(base(X).logits, theirs(X).logits, rtol=1e-5, atol=1e-6)


def test_a_bias_of_ones_own_stands_in_the_place_of_the_bases_or_where_there_is_none() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False))
    adapters, x = ak.Adapters(net), torch.randn(2, 3)
    first, second = (point.id for point in adapters.points() if point.kind == "weight")
    adapters.add("b", ak.Trainable(part="bias", absolute=True, settings={first: {}, second: {}}))
    assert torch.equal(adapters.modules("b")[first].bias, net[0].bias)  # type: ignore[arg-type]
    randomize(adapters, "b")
    one, two = (adapters.modules("b")[key].bias for key in (first, second))
    adapters.activate("b")
    torch.testing.assert_close(net(x), (x @ net[0].weight.mT + one) @ net[1].weight.mT + two)  # type: ignore[operator]
    with pytest.raises(errors.ConfigError, match="part must be 'bias'"):
        ak.Trainable(absolute=True)
