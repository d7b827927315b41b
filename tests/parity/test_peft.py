"""The same weights give the same outputs as PEFT 0.21, and PEFT's convolution defects are not shared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapters.lora import LoRA
from adapterkit.mapping.family import weight_layout
from adapterkit.points import InjectionPoint, WeightPoint

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def transposed(inputs: int, outputs: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


def image() -> Tensor:
    return torch.randn(2, 6, 12, 10)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(16, 24), lambda: torch.randn(2, 5, 16)),
    "linear-transposed": (lambda: transposed(16, 24), lambda: torch.randn(2, 5, 16)),
    "embedding": (lambda: nn.Embedding(11, 16), lambda: torch.randint(11, (2, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), image),
    "conv2d-1x1": (lambda: nn.Conv2d(6, 8, 1), image),
    "conv2d-stride-padding": (lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2)), image),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), lambda: torch.randn(1, 4, 5, 4, 3)),
}


def theirs_and_ours(layer: nn.Module, rank: int, alpha: float) -> tuple[Any, Any, Any]:
    """PEFT's model with random factors, and our module with the same."""
    point = point_of(layer)
    transposed = point.layout.form == "linear_t"  # type: ignore[union-attr]
    config = peft.LoraConfig(target_modules=["layer"], r=rank, lora_alpha=alpha, fan_in_fan_out=transposed)
    model = peft.get_peft_model(Model(layer), config)
    wrapped = model.base_model.model.layer
    embedding = isinstance(layer, nn.Embedding)
    factors = (
        (wrapped.lora_embedding_A["default"], wrapped.lora_embedding_B["default"])
        if embedding
        else (wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight)
    )
    for factor in factors:
        nn.init.normal_(factor)
    ours = LoRA(rank=rank, alpha=alpha, targets="*").build(point)
    ours.A.data = factors[0].data.clone()
    ours.B.data = factors[1].data.flatten(1).clone()
    return model, wrapped, ours


def point_of(layer: nn.Module) -> InjectionPoint:
    found = weight_layout(layer)
    assert found is not None
    layout, inputs, outputs = found
    return WeightPoint("layer", "layer", "", inputs, outputs, layout)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


@pytest.mark.parametrize("name", list(LAYERS))
def test_lora(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), LAYERS[name][1]()
    base = layer(x).detach()
    model, wrapped, ours = theirs_and_ours(layer, rank=4, alpha=6)
    theirs = model(x)
    assert not close(base, theirs)
    assert close(ours(x, layer), theirs)
    delta = wrapped.get_delta_weight("default")
    transposed_layout = ours.layout.form in ("linear_t", "embedding")
    assert close(ours.delta_weight(), delta.T if transposed_layout else delta)


def test_lora_gradients() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24), torch.randn(2, 5, 16)
    model, wrapped, ours = theirs_and_ours(layer, rank=4, alpha=6)
    model(x).square().sum().backward()
    ours(x, layer).square().sum().backward()
    assert close(ours.A.grad, wrapped.lora_A["default"].weight.grad)
    assert close(ours.B.grad, wrapped.lora_B["default"].weight.grad)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=2, dilation=2),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
    ],
    ids=["dilation", "reflect", "circular"],
)
def test_convolutions_that_peft_gets_wrong(layer: nn.Conv2d) -> None:
    """PEFT's first factor drops dilation and padding mode; its merged weight is right, and ours equals that always."""
    torch.manual_seed(0)
    x = image()
    _, wrapped, ours = theirs_and_ours(layer, rank=4, alpha=6)
    delta = wrapped.get_delta_weight("default")
    assert close(ours.delta_weight(), delta)
    merged = nn.Conv2d(6, 8, 3, padding=layer.padding, dilation=layer.dilation, padding_mode=layer.padding_mode)
    merged.load_state_dict({"weight": layer.weight + delta, "bias": layer.bias})
    assert close(ours(x, layer), merged(x))


@pytest.mark.parametrize("role", ["attn.k", "mlp.down"])
@pytest.mark.parametrize("name", ["linear", "linear-transposed", "conv2d-stride-padding", "conv3d"])
def test_ia3(name: str, role: str) -> None:
    """PEFT says feed-forward where the input is scaled."""
    ia3 = pytest.importorskip("adapterkit_ia3.ia3")
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), LAYERS[name][1]()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    point = dataclasses.replace(point_of(layer), role=role)
    ours = ia3.IA3().build(point)
    nn.init.normal_(ours.scale)
    config = peft.IA3Config(
        target_modules=["layer"],
        feedforward_modules=["layer"] if role == "mlp.down" else [],
        fan_in_fan_out=name == "linear-transposed",
    )
    model = peft.get_peft_model(Model(layer), config)
    vector = model.base_model.model.layer.ia3_l["default"]
    vector.data = ours.scale.data.reshape(vector.shape).clone()
    theirs = model(x)
    assert not close(layer(x), theirs)
    assert close(ours(x, layer), theirs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_prefix(name: str) -> None:
    """PEFT's prefix is a cache, and moves the tokens' positions; ours does not: told them, it gives the same."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = {
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=11)),
        "GPT2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11)),
    }[name]()
    base.eval()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    nn.init.normal_(weight)
    adapters = ak.Adapters(base)
    adapters.add("p", ak.Prefix(length=3))
    heads = 1 if name == "Llama" else 2
    for layer, module in enumerate(adapters.modules("p").values()):
        parts = weight.data.view(3, 4, heads, 8)[:, 2 * layer : 2 * layer + 2].permute(1, 2, 0, 3)
        module.keys.data.copy_(parts[0])
        module.values.data.copy_(parts[1])
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits
    with adapters.disabled():
        assert not close(base(ids).logits, expected)
    assert close(base(ids, position_ids=torch.arange(3, 8)[None]).logits, expected)
