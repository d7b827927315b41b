"""Lily: conformance, sharing, and PEFT's numbers from the same tensors."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from adapterkit_peft_types.lily import Lily
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


class TestConformance(AdapterConformance):
    config = Lily(rank=3, stride=2)


class Layers(nn.Module):
    """Two kinds of layers, three of each, of which one has another shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"a": ((6, 8), (6, 8), (6, 8)), "b": ((8, 6), (8, 6), (8, 4))}
        for name, own in shapes.items():
            for i, (width, out) in enumerate(own):
                self.add_module(f"{name}{i}", nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.get_submodule(f"b{i}")(self.get_submodule(f"a{i}")(x).relu())
        return x


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 2, 6)])
def test_it_is_that_of_peft(stride: int, shape: tuple[int, ...]) -> None:
    """PEFT's groups are by the ends of names; ours are named."""
    peft = pytest.importorskip("peft")
    base = Layers().eval()
    names = [f"{kind}{i}" for i in range(3) for kind in "ab"]
    options = {"r": 3, "num_B": 3, "stride_A": stride, "scaling": 1.7}
    config = peft.LilyConfig(target_modules=r"(a|b)\d", **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for key, parameter in theirs.named_parameters():
        if "lily" in key:
            nn.init.normal_(parameter)
    adapters = ak.Adapters(base)
    targets = " ".join(f"path:{name}" for name in names)
    points, count = ak.points(base, targets), collections.Counter[Any]()
    settings: dict[str, dict[str, Any]] = {}
    for point in points:
        settings[point.id] = {"a": f"{point.shape}-{count[point.shape] // stride}", "b": "one"}
        count[point.shape] += 1
    adapters.add("a", Lily(rank=3, experts=3, scale=1.7, over="batch", settings=settings))
    paths = {point.id: point.path for point in adapters.points()}
    for key, module in adapters.modules("a").items():
        layer = theirs.base_model.model.get_submodule(paths[key])
        module.router.data.copy_(layer.lily_router["default"].weight.data)  # type: ignore[union-attr,operator]
        a, b = module.shared.places[key]
        module.shared.A[a].data.copy_(layer.lily_A["default"].weight.data)
        module.shared.B[b].data.copy_(layer.lily_B["default"].weight.data.view(3, 3, -1))
    x = torch.randn(shape)
    expected, found = theirs(x), base(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(found, Layers()(x), atol=1e-3)
    count = sum(p.numel() for key, p in theirs.named_parameters() if "lily" in key)
    assert sum(p.numel() for p in adapters.parameters("a")) == count


def test_rows_do_not_depend_on_each_other() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    adapters = ak.Adapters(model)
    adapters.add("a", Lily(rank=2, targets="*"))
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 4)
    assert torch.allclose(model(x)[1], model(x[1:2])[0], atol=1e-6)


@pytest.mark.parametrize("options", [{"experts": 1}, {"stride": 0}, {"over": "token"}, {"scale": 1e9}])
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        Lily(**options)


def test_layers_share() -> None:
    """One B for all layers of a role, one A for every two of them."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **size))
    adapters = ak.Adapters(model)
    adapters.add("a", Lily(rank=2, stride=2, targets="attn.q mlp.up"))
    shared = next(iter(adapters.modules("a").values())).shared
    assert len(shared.B) == 2
    assert len(shared.A) == 4
    report = adapters.add("b", Lily(rank=2, targets="attn.q"))
    assert report.parameters == 4 * (2 * 16 + 2 * 2) + 2 * 2 * 16
