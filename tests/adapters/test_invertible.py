"""Invertible adapters: the equations, the inverse, and where both act."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapters.invertible import Coupling
from adapterkit.errors import ConfigError, IncompatibleTargetError, NotMergeableError
from adapterkit.testing import toys
from tests.backends.language_models import build, output, shake, tokens
from tests.backends.vision_models import images, timm_vit
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def coupling(name: str, features: int = 8) -> Coupling:
    config = ak.Invertible(coupling=name, activation="tanh")
    made = config.shared([p for p in ak.points(toys.ToyModel()) if p.role == "tokens"]).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.7)
    assert made.F.down.in_features == features // 2
    return made


def net(part: Any, h: Tensor) -> Tensor:
    return torch.tanh(h @ part.down.weight.mT + part.down.bias) @ part.up.weight.mT + part.up.bias


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("name", ["additive", "affine"])
def test_the_inverse_undoes_it(name: str, shape: tuple[int, ...], model: toys.ToyModel) -> None:
    """AdapterHub's Glow coupling failed on [batch, length, features]."""
    made, x = coupling(name), torch.randn(shape, dtype=torch.float64)
    y = made(x)
    assert not torch.allclose(y, x, atol=0.1)
    assert close(made.inverse(y), x)
    assert close(made(made.inverse(x)), x)


def test_equations(model: toys.ToyModel) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    x1, x2 = x[..., :4], x[..., 4:]
    additive = coupling("additive")
    y1 = x1 + net(additive.F, x2)
    assert close(additive(x), torch.cat([y1, x2 + net(additive.G, y1)], -1))
    affine = coupling("affine")

    def moved(half: Tensor, by: Tensor) -> Tensor:
        return half * torch.exp(10 / math.pi * torch.atan(by[..., :4] / 5)) + by[..., 4:]

    y1 = moved(x1, net(affine.F, x2))
    assert close(affine(x), torch.cat([y1, moved(x2, net(affine.G, y1))], -1))


@pytest.mark.parametrize("name", ["additive", "affine"])
def test_tokens_and_head_share_one_transform(model: toys.ToyModel, name: str, tmp_path: Path) -> None:
    base = model(X)
    adapters = ak.Adapters(model)
    report = adapters.add("a", ak.Invertible(coupling=name))
    assert torch.equal(model(X), base)
    assert sorted(adapters.modules("a")) == ["head@toy", "tokens@toy"]
    shared: Any = next(iter(adapters.modules("a").values())).shared
    assert report.parameters == sum(p.numel() for p in shared.parameters())
    randomize(adapters, "a")
    y = model(X)
    h = shared(model.embed.weight[X])
    with adapters.disabled():
        for block in model.blocks:
            h = block(h)
        assert close(y, model.head(shared.inverse(model.norm(h))))
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters("a"))
    path = adapters.save("a", tmp_path / "a.safetensors")
    adapters.detach()
    assert torch.equal(model(X), base)
    adapters.load(path)
    adapters.activate("a")
    assert torch.equal(model(X), y)


def test_without_blocks_between_nothing_is_left(model: toys.ToyModel) -> None:
    """Head of inverse of transform: also where two are stacked, the second undone first."""
    model.blocks, model.norm = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]
    base = model(X)
    adapters = ak.Adapters(model)
    for name in ("a", "b"):
        adapters.add(name, ak.Invertible(coupling="affine"))
        randomize(adapters, name)
    adapters.activate(ak.Stack("a", "b"))
    assert close(model(X), base)
    adapters.activate({"a": 0.5})
    assert not close(model(X), base)


def test_routed_rows_are_those_of_one_adapter(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    rows: dict[str | None, Tensor] = {None: model(X)}
    for name in ("a", "b"):
        adapters.add(name, ak.Invertible())
        shake(adapters, name, 0.3 if name == "a" else 0.5)
        adapters.activate(name)
        rows[name] = model(X)
    routes = ["b", None, "a"]
    with adapters.routed(routes):
        y = model(X)
    assert close(y, torch.stack([rows[name][i] for i, name in enumerate(routes)]))


@pytest.mark.parametrize("layout", ["GPT2", "Llama", "Bert"])
def test_language_models(layout: str) -> None:
    head = "BertForMaskedLM" if layout == "Bert" else None
    model = build(layout, head)
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base = output(model, tokens())
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Invertible())
    assert torch.equal(output(model, tokens()), base)
    shake(adapters)
    y, modules = output(model, tokens()), adapters.modules("a")
    shared: Any = modules["head@language"].shared
    decoder = model.get_output_embeddings()
    with adapters.disabled():
        assert close(y, decoder(shared.inverse(seen[-1])))
    assert not torch.allclose(y, base, atol=1e-3)


def test_the_embedded_sequence_of_an_encoder_without_a_head() -> None:
    for model, run in (
        (build("Bert"), lambda m: output(m, tokens())),
        (timm_vit().double(), lambda m: m(images(dtype=torch.float64))),
    ):
        base = run(model)
        adapters = ak.Adapters(model)
        adapters.add("a", ak.Invertible(targets="tokens"))
        assert torch.equal(run(model), base)
        shake(adapters)
        assert not torch.allclose(run(model), base, atol=1e-3)


def test_half_precision_goes_through_in_half_precision(model: toys.ToyModel) -> None:
    model = model.bfloat16()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Invertible(coupling="affine"))
    randomize(adapters, "a")
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}
    assert model(X).dtype == torch.bfloat16


def test_has_no_equivalent_weight(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Invertible())
    with pytest.raises(NotMergeableError):
        adapters.merge("a")


def test_refusals(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    with pytest.raises(ConfigError, match="must name 'tokens'"):
        adapters.add("a", ak.Invertible(targets="head"))
    with pytest.raises(IncompatibleTargetError, match="in front of a linear 'head'"):
        adapters.add("a", ak.Invertible(targets="tokens attn.q"))
    vit = ak.Adapters(timm_vit())
    with pytest.raises(IncompatibleTargetError, match="made longer there, not embedded: use 'tokens'"):
        vit.add("a", ak.Invertible(targets="tokens prompt"))
    with pytest.raises(IncompatibleTargetError, match="7 features cannot be halved"):
        ak.Adapters(toys.ToyModel(width=7, layers=0)).add("a", ak.Invertible())
    assert len(adapters) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("coupling", v) for v in ("nice", "", None)),
        *(("activation", v) for v in ("relu7", None)),
        *(("reduction", v) for v in (0, -2, math.inf, math.nan, "2", True)),
    ],
)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        ak.Invertible(**{key: value})
    assert repr(value) in str(caught.value)


def test_round_trip_through_json() -> None:
    config = ak.Invertible(coupling="affine", reduction=4, activation="silu")
    assert ak.Invertible.from_dict(json.loads(json.dumps(config.to_dict()))) == config
