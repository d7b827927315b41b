"""LoRA's variants, DoRA and AdaLoRA compute what PEFT 0.21 computes from the same weights, and more where it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

peft = pytest.importorskip("peft")


class Model(nn.Module):
    """A linear layer, and a convolution over its features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x).relu().view(-1, 4, 2, 2))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def both(config: ak.AdapterConfig, **theirs: Any) -> tuple[Any, nn.Module, ak.Adapters]:
    """PEFT's model with random factors, and ours without."""
    base = Model()
    rank = {} if "init_r" in theirs else {"r": 3}
    options = {**rank, "lora_alpha": 7, "target_modules": ["first", "conv"], **theirs}
    cls = peft.AdaLoraConfig if "init_r" in theirs else peft.LoraConfig
    their_model = peft.get_peft_model(copy.deepcopy(base), cls(**options)).eval()
    adapters = ak.Adapters(base.eval())
    adapters.add("a", config)
    return their_model, base, adapters


def randomise(their_model: Any) -> None:
    for name, parameter in their_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            if "magnitude" in name:
                parameter.data.abs_().add_(0.5)


def take(adapters: ak.Adapters, their_model: Any) -> None:
    """Copies PEFT's factors into ours."""
    layers = {"first": their_model.base_model.model.first, "conv": their_model.base_model.model.conv}
    for key, module in adapters.modules("a").items():
        layer = layers["conv" if "conv" in key else "first"]
        module.A.data.copy_(layer.lora_A["default"].weight.view_as(module.A))  # type: ignore[union-attr,operator,arg-type]
        module.B.data.copy_(layer.lora_B["default"].weight.flatten(1))  # type: ignore[union-attr,operator]
        if hasattr(module, "magnitude"):
            magnitude = layer.lora_magnitude_vector["default"].weight
            module.magnitude.data.copy_(magnitude.flatten())  # type: ignore[union-attr,operator]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() <= 1e-5 * theirs.abs().max().item()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ak.LoRA(rank=3, alpha=7, targets="*", scaling="rank_stabilized"), {"use_rslora": True}),
        (ak.LoRA(rank=3, alpha=7, targets="*", ranks={"path:conv": 5}), {"rank_pattern": {"conv": 5}}),
        (ak.LoRA(rank=3, alpha=7, targets="*", alphas={"path:conv": 2}), {"alpha_pattern": {"conv": 2}}),
        (ak.DoRA(rank=3, alpha=7, targets="*"), {"use_dora": True}),
        (ak.DoRA(rank=3, alpha=7, targets="*", scaling="rank_stabilized"), {"use_dora": True, "use_rslora": True}),
    ],
)
def test_same_weights_same_outputs(ours: ak.AdapterConfig, theirs: dict[str, Any]) -> None:
    their_model, model, adapters = both(ours, **theirs)
    randomise(their_model)
    take(adapters, their_model)
    expected = their_model(X)
    assert close(model(X), expected)
    with adapters.merged():
        assert close(model(X), expected)
    merged = copy.deepcopy(their_model).merge_and_unload()
    assert close(merged(X), expected)  # PEFT's DoRA merges right with a bias too; AdapterHub's does not


@pytest.mark.parametrize(("ours", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_starts_from_the_base(ours: str, theirs: str) -> None:
    """PEFT moves the start into the base; ours leaves it, and trains to the same model."""
    base = Model()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["first"], init_lora_weights=theirs)
    their_model = peft.get_peft_model(copy.deepcopy(base), config)
    before = base.first.weight.clone()
    adapters = ak.Adapters(base)
    adapters.add("a", ak.LoRA(rank=3, alpha=7, targets="path:first", init=ours))
    [module] = adapters.modules("a").values()
    layer = their_model.base_model.model.first
    product = module.B @ module.A  # type: ignore[operator]
    assert close(product, layer.lora_B["default"].weight @ layer.lora_A["default"].weight)  # type: ignore[arg-type]
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    module.A.data.copy_(layer.lora_A["default"].weight.data.add_(noise))  # type: ignore[union-attr,operator]
    module.B.data.copy_(layer.lora_B["default"].weight.data)  # type: ignore[union-attr,operator]
    start = adapters.state_dict("a")
    for key in ("A", "B"):  # singular vectors are found up to a sign: take PEFT's
        [name] = [name for name in start if name.endswith(f"/{key}0")]
        factor = layer.lora_A["default"].weight.data - noise if key == "A" else layer.lora_B["default"].weight.data
        start[name].copy_(factor)
    assert close(base(X), their_model(X))
    assert torch.equal(base.first.weight, before)


def test_adalora() -> None:
    their_model, model, adapters = both(
        ak.AdaLoRA(rank=2, initial=3, alpha=7, targets="path:first"),
        init_r=3, target_r=2, total_step=10, target_modules=["first"],
    )  # fmt: skip
    randomise(their_model)
    layer = their_model.base_model.model.first
    [module] = adapters.modules("a").values()
    module.Q.data.copy_(layer.lora_A["default"].data)  # type: ignore[union-attr,operator]
    module.P.data.copy_(layer.lora_B["default"].data)  # type: ignore[union-attr,operator]
    module.E.data.copy_(layer.lora_E["default"].data.flatten())  # type: ignore[union-attr,operator]
    assert close(model(X), their_model(X))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_convolutions_start_where_peft_refuses(init: str) -> None:
    config = peft.LoraConfig(r=3, target_modules=["conv"], init_lora_weights=init)
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.get_peft_model(Model(), config)
    model = Model().eval()
    base = model(X)
    ak.Adapters(model).add("a", ak.LoRA(rank=3, targets="path:conv", init=init))
    assert close(model(X), base)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_dora_convolves_as_its_layer_does(options: dict[str, Any]) -> None:
    """PEFT's convolutions forget dilation and padding mode."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options)).double().eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    adapters = ak.Adapters(model)
    adapters.add("a", ak.DoRA(rank=2, alpha=3, targets="*"))
    for parameter in adapters.parameters():
        parameter.data.normal_()
    y = model(x)
    with adapters.merged():
        assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)
