"""DeLoRA, GraLoRA, HiRA, elementwise GLoRA: conformance, and PEFT's numbers from the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapterkit_peft_types.delora import DeLoRA
from adapterkit_peft_types.glora import ElementwiseGLoRA
from adapterkit_peft_types.gralora import GraLoRA
from adapterkit_peft_types.hira import HiRA
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestDeLoRA(AdapterConformance):
    config = DeLoRA(rank=3, bound=2)


@pytest.mark.slow
class TestGraLoRA(AdapterConformance):
    config = GraLoRA(rank=4, blocks=2, whole=1, alpha=3)


class TestHiRA(AdapterConformance):
    config = HiRA(rank=3)


@pytest.mark.slow
class TestElementwiseGLoRA(AdapterConformance):
    config = ElementwiseGLoRA(rank=2)


@pytest.mark.slow
class TestElementwiseGLoRAOfRows(AdapterConformance):
    config = ElementwiseGLoRA(weight="rows", coupling="columns", bias="rows")


PATHS = "path:first path:second"
TARGETS = ["first", "second"]


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.parametrize("options", [{"r": 3, "delora_lambda": 3}, {"r": 1, "init_weights": False}])
def test_delora_is_that_of_peft(same_as_peft: Callable[..., None], peft: Any, options: dict[str, Any]) -> None:
    def copied(module: Any, layer: Any) -> None:
        for ours, other in (("A", "A"), ("B", "B"), ("bound", "lambda"), ("norms", "w_norm")):
            getattr(module, ours).data.copy_(getattr(layer, f"delora_{other}")["default"].data)

    same_as_peft(DeLoRA(rank=options["r"], targets=PATHS), peft.DeloraConfig(target_modules=TARGETS, **options), copied)


def test_delora_starts_with_the_norms_of_columns() -> None:
    layer = nn.Conv2d(3, 4, 2)
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", DeLoRA(rank=2, targets="*", bound=3))
    (module,) = adapters.modules("a").values()
    assert torch.allclose(module.norms, layer.weight.norm(dim=0))  # type: ignore[arg-type]
    nn.init.normal_(module.B)  # type: ignore[arg-type]
    update = module.delta_weight() / module.norms  # type: ignore[operator]
    assert update.flatten(1).norm() <= 3 + 1e-5


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 6, "gralora_k": 3, "hybrid_r": 2, "alpha": 5}])
def test_gralora_is_that_of_peft(same_as_peft: Callable[..., None], peft: Any, options: dict[str, Any]) -> None:
    def copied(module: Any, layer: Any) -> None:
        module.A.data.copy_(layer.gralora_A["default"].data)
        module.B.data.copy_(layer.gralora_B["default"].data)
        if module.A_whole is not None:
            module.A_whole.data.copy_(layer.gralora_A_general["default"].weight.data)
            module.B_whole.data.copy_(layer.gralora_B_general["default"].weight.data)

    theirs = peft.GraloraConfig(target_modules=TARGETS, **options)
    model = nn.Sequential()
    for name, layer in (("first", nn.Linear(12, 18)), ("second", nn.Linear(18, 6, bias=False))):
        model.add_module(name, layer)
    names = {"r": "rank", "gralora_k": "blocks", "hybrid_r": "whole", "alpha": "alpha"}
    ours = {"alpha": 64.0, **{names[key]: value for key, value in options.items()}}
    ours["alpha"] = float(ours["alpha"])
    same_as_peft(GraLoRA(targets=PATHS, **ours), theirs, copied, model)


def test_gralora_of_a_convolution() -> None:
    """Blocks of channels, with all of a kernel: block by block the product of its own two factors."""
    layer = nn.Conv2d(4, 6, 3, padding=1)
    adapters = ak.Adapters(nn.Sequential(layer))
    adapters.add("a", GraLoRA(rank=4, blocks=2, targets="*"))
    (module,) = adapters.modules("a").values()
    nn.init.normal_(module.B)  # type: ignore[arg-type]
    a, b, update = module.A, module.B, module.delta_weight()  # type: ignore[operator]
    for out in range(2):
        for inner in range(2):
            block = update[3 * out : 3 * out + 3, 2 * inner : 2 * inner + 2].flatten(1)
            expected = a[inner][:, 2 * out : 2 * out + 2] @ b[out][2 * inner : 2 * inner + 2]  # type: ignore[index]
            assert torch.allclose(block, expected.mT, atol=1e-6)


@pytest.mark.parametrize("layers", [["first", "second"], ["conv", "last"]])
def test_hira_is_that_of_peft(same_as_peft: Callable[..., None], peft: Any, layers: list[str]) -> None:
    def copied(module: Any, layer: Any) -> None:
        module.A.data.copy_(layer.hira_A["default"].data)
        module.B.data.copy_(layer.hira_B["default"].data.flatten(1))

    theirs = peft.HiraConfig(target_modules=layers, r=3)
    same_as_peft(HiRA(rank=3, targets=" ".join(f"path:{name}" for name in layers)), theirs, copied)


def test_hira_of_an_embedding(same_as_peft: Callable[..., None], peft: Any) -> None:
    def copied(module: Any, layer: Any) -> None:
        module.A.data.copy_(layer.hira_embedding_A["default"].data)
        module.B.data.copy_(layer.hira_embedding_B["default"].data)

    model = nn.Sequential()
    model.add_module("emb", nn.Embedding(9, 5))
    model.add_module("last", nn.Linear(5, 3))
    ids = torch.tensor([[1, 8, 0], [3, 3, 2]])
    same_as_peft(HiRA(rank=2, targets="path:emb"), peft.HiraConfig(target_modules=["emb"], r=2), copied, model, ids)


def test_dropout_reaches_the_update_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    adapters = ak.Adapters(model)
    adapters.add("a", HiRA(rank=2, dropout=0.999999, targets="*"))
    (module,) = adapters.modules("a").values()
    nn.init.normal_(module.B)  # type: ignore[arg-type]
    x = torch.randn(3, 5)
    with adapters.disabled():
        base = model(x)
    assert not torch.allclose(model.eval()(x), base)
    assert torch.allclose(model.train()(x), base)


_OF_GLORA = {"lora": "low_rank", "vector": "rows", "constant": "constant", "none": "none"}


@pytest.mark.parametrize(
    ("weight", "coupling", "bias"),
    [
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "none"),
        ("none", "lora", "vector"),
    ],
)
def test_glora_is_that_of_peft(
    same_as_peft: Callable[..., None], peft: Any, weight: str, coupling: str, bias: str
) -> None:
    def copied(module: Any, layer: Any) -> None:
        for name in "ABCDE":
            ours, theirs = getattr(module, name), getattr(layer, f"glora_{name}")["default"]
            pairs = {"Xd": "down", "Xu": "up", "X": "value"}
            for other, parameter in theirs.named_parameters():
                getattr(ours, pairs[other]).data.copy_(parameter.data)
            assert (ours is None) == (not list(theirs.parameters()))

    targets = ["first", "last"] if weight == "none" else TARGETS
    theirs = peft.GloraConfig(target_modules=targets, r=3, config_A_B=weight, config_C=coupling, config_D_E=bias)
    named = "columns" if coupling == "vector" else _OF_GLORA[coupling]
    ours = ElementwiseGLoRA(
        rank=3,
        weight=_OF_GLORA[weight],
        coupling=named,
        bias=_OF_GLORA[bias],
        targets=" ".join(f"path:{name}" for name in targets),
    )
    same_as_peft(ours, theirs, copied)


def test_glora_without_a_bias_has_none() -> None:
    adapters = ak.Adapters(nn.Sequential(nn.Linear(4, 3, bias=False)))
    adapters.add("a", ElementwiseGLoRA(rank=2, targets="*"))
    (module,) = adapters.modules("a").values()
    assert [name for name, _ in module.named_children()] == ["A", "B"]
    with pytest.raises(errors.IncompatibleTargetError, match="nothing to learn"):
        adapters.add("b", ElementwiseGLoRA(weight="none", targets="*"))


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (DeLoRA, {"rank": 0}, "rank"),
        (DeLoRA, {"bound": 0.0}, "bound"),
        (GraLoRA, {"rank": 5}, "rank"),
        (GraLoRA, {"blocks": 0}, "blocks"),
        (GraLoRA, {"whole": -1}, "whole"),
        (GraLoRA, {"alpha": 1e9}, "alpha"),
        (HiRA, {"dropout": 1.0}, "dropout"),
        (ElementwiseGLoRA, {"weight": "lora"}, "weight"),
        (ElementwiseGLoRA, {"rank": 0}, "rank"),
    ],
)
def test_wrong_values(cls: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.ConfigError, match=named):
        cls(**options)


def test_blocks_that_do_not_divide_a_layer() -> None:
    with pytest.raises(errors.IncompatibleTargetError, match="7 x 4, which blocks=2"):
        ak.Adapters(nn.Sequential(nn.Linear(4, 7))).add("a", GraLoRA(targets="*"))
