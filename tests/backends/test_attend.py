"""Attentions of adapters beside the softmax: what every seam gives them, and what becomes of what they return."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import adapterkit as ak
from adapterkit.backend import AttentionSeam
from adapterkit.errors import AttachError, ConfigError, IncompatibleTargetError, NotMergeableError, PluginError
from adapterkit.testing import toys
from tests.backends import dense_models, diffusion_models, language_models, transformers_models
from tests.backends import vision_families as families
from tests.backends import vision_models as vision

EXACT = {"rtol": 1e-8, "atol": 1e-8}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class DoubleModule(ak.AdapterModule):
    """Twice the attention; it notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
        y = base(query)
        self.seen.append((query, keys, values, y, base.mix(query, keys, values)))
        return 2 * y


class DoubleValues(ak.AdapterModule):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return 2 * weight, None if bias is None else 2 * bias


@dataclass(frozen=True)
class Double(ak.AdapterConfig):
    """The attention's output twice, said at the attention and said of the layers that make the values."""

    kinds = frozenset({"attention"})
    targets: str = "*"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return DoubleModule()


@dataclass(frozen=True)
class OfValues(ak.AdapterConfig):
    kinds = frozenset({"weight"})
    targets: str = "{attn,cross}.v"

    def build(self, point: ak.InjectionPoint) -> ak.AdapterModule:
        return DoubleValues()


def doubled(model: nn.Module, run: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor, ak.Adapters]:
    """The output with every attention doubled, and with all values doubled; the first stays."""
    model.requires_grad_(False)
    adapters = ak.Adapters(model)
    roles = {point.role for point in adapters.points() if point.kind == "attention"}
    adapters.add("values", OfValues(" ".join(f"{role.removesuffix('.kv')}.v" for role in sorted(roles))))
    expected = run(model)
    adapters.remove("values")
    adapters.add("attention", Double())
    found = run(model)
    assert all(module.seen for module in adapters.modules("attention").values())
    return found, expected, adapters


def check_mixes(adapters: ak.Adapters) -> None:
    """The last query sees every key: there the adapters' own softmax is the model's."""
    for key, module in adapters.modules("attention").items():
        for query, keys, values, y, mixed in module.seen:  # type: ignore[union-attr]
            layout = next(p.layout for p in adapters.points() if p.id == key)
            assert keys.shape[1] in (layout.kv_heads, query.shape[1])
            assert keys.shape[:3] == values.shape[:3]
            assert (query.shape[-1], y.shape[-1]) == (layout.head_dim, layout.value_width)
            torch.testing.assert_close(mixed[:, :, -1], y[:, :, -1], **CLOSE)
        assert module.seen  # type: ignore[union-attr]


# --- every seam ------------------------------------------------------------------------------------------------------

BIASED = ("bloom", "falcon alibi", "mpt", "deberta", "gemma2", "modernbert")
"""Families that add something of their own to the logits, cap them, or see a window alone."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", language_models.EVERY)
def test_language_models(layout: str, attention: str) -> None:
    model = language_models.build(layout, attention=attention)
    run = lambda model: language_models.output(model, language_models.tokens(length=5))  # noqa: E731
    found, expected, adapters = doubled(model, run)
    torch.testing.assert_close(found, expected, **EXACT)
    check_mixes(adapters)


@pytest.mark.parametrize("name", dense_models.VARIANTS)
def test_dense_language_models(name: str) -> None:
    model = dense_models.build(
        name, **({"attn_config": {"attn_impl": "torch"}} if name == "mpt" else {})
    )  # no clipping
    run = lambda model: language_models.output(model, language_models.tokens(length=4))  # noqa: E731
    found, expected, adapters = doubled(model, run)
    torch.testing.assert_close(found, expected, **CLOSE)
    if not name.startswith(BIASED):
        check_mixes(adapters)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders(name: str) -> None:
    model = transformers_models.build(next(key for key in transformers_models.CONFIGS if key.startswith(name)))
    found, expected, adapters = doubled(model, transformers_models.run)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert {key.partition("@")[0] for key in adapters.modules("attention")} == {"attn.kv", "cross.kv"}
    if name != "T5":
        check_mixes(adapters)


VISION = [name for name in families.FAMILIES if name not in families.WITHOUT_PREFIX]


@pytest.mark.parametrize("name", VISION)
def test_vision_models(name: str) -> None:
    model = families.build(name, torch.float64)
    for key, parameter in model.named_parameters():
        if key.endswith("v_bias"):  # it is no layer's, so doubling the layer leaves it
            nn.init.zeros_(parameter)
    found, expected, adapters = doubled(model, families.see)
    torch.testing.assert_close(found, expected, **CLOSE)
    if not any(part in name for part in ("swin", "beit", "hiera", "siglip text")):
        check_mixes(adapters)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "sana"])
def test_diffusion_transformers(name: str) -> None:
    model = diffusion_models.FAMILIES[name]().double()
    found, expected, adapters = doubled(model, diffusion_models.run)
    torch.testing.assert_close(found, expected, **CLOSE)
    if name in ("sd3", "flux"):  # the others' text has padding
        check_mixes(adapters)


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
def test_unets(processor: str) -> None:
    from diffusers.models import attention_processor

    model = vision.unet().double().eval()
    model.set_attn_processor(getattr(attention_processor, processor)())
    found, expected, adapters = doubled(model, vision.denoise)
    torch.testing.assert_close(found, expected, **CLOSE)
    check_mixes(adapters)


# --- what is beside --------------------------------------------------------------------------------------------------


def llama(**options: Any) -> tuple[Any, ak.Adapters]:
    model = language_models.build("Llama", **options)
    adapters = ak.Adapters(model)
    adapters.add("prefix", ak.Prefix(length=3, init_std=1.0))
    for parameter in adapters.parameters("prefix"):
        nn.init.normal_(parameter)
    adapters.add("double", Double())
    return model, adapters


@pytest.mark.parametrize("order", [["prefix", "double"], ["double", "prefix"]])
def test_beside_a_prefix_it_gets_the_models_own_keys(order: list[str]) -> None:
    model, adapters = llama()
    adapters.activate(order)
    together = language_models.output(model, language_models.tokens())
    for module in adapters.modules("double").values():
        assert module.seen[0][1].shape[2] == 7  # type: ignore[union-attr,index]
    adapters.remove("double")
    adapters.add("values", OfValues("attn.v"))
    for module in adapters.modules("prefix").values():
        module.values.data.mul_(2)  # type: ignore[union-attr,operator]
    adapters.activate(["prefix", "values"])
    torch.testing.assert_close(together, language_models.output(model, language_models.tokens()), **EXACT)


@pytest.mark.parametrize(
    ("choice", "factor"),
    [
        ({"double": 0.5}, 1.5),
        ({"double": -1.0}, 0.0),
        ({"double": 1.0, "other": 2.0}, 4.0),
        (ak.Stack("double", "other"), 4.0),
        (ak.Average("double", "other"), 2.0),
        (ak.Average("double", "lora"), 1.5),
        (ak.Parallel("double", "other"), 3.0),
    ],
)
def test_weights_and_expressions_are_those_of_everywhere(choice: Any, factor: float) -> None:
    toys.register()
    model = toys.ToyModel().double().eval()
    adapters = ak.Adapters(model)
    adapters.add("double", Double())
    adapters.add("other", Double())
    adapters.add("lora", ak.LoRA(rank=2, targets="mlp.up"))
    attention, x = model.blocks[0].attn, torch.randn(2, 5, toys.WIDTH).double()
    seen: list[Tensor] = []
    attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for one in (None, choice):
        with adapters.activated(one):
            attention(x)
    torch.testing.assert_close(seen[1], factor * seen[0], **EXACT)


def test_rows_have_their_own() -> None:
    model, adapters = llama()
    ids = language_models.tokens(4)
    with adapters.routed(["double", None, "prefix", ak.Parallel("double", "prefix")]):
        together = language_models.output(model, ids)
    for row, name in enumerate(["double", None, "prefix", ["double", "prefix"]]):
        with adapters.activated(name):
            torch.testing.assert_close(together[row], language_models.output(model, ids[row : row + 1])[0], **EXACT)


def test_a_negative_weight_is_for_types_that_extend_nothing() -> None:
    _, adapters = llama()
    adapters.activate({"double": -0.5})
    with pytest.raises(ConfigError, match="'prefix' multiplies attention"):
        adapters.activate({"prefix": -0.5})


def test_it_cannot_be_merged() -> None:
    _, adapters = llama()
    with pytest.raises(NotMergeableError, match=r"attn\.kv"):
        adapters.merge("double")


def test_an_adapted_model_is_copied() -> None:
    model, adapters = llama()
    adapters.activate("double")
    model.requires_grad_(False)
    expected = language_models.output(model, language_models.tokens())
    for module in adapters.modules("double").values():
        module.seen.clear()  # type: ignore[union-attr]
    assert torch.equal(language_models.output(pickle.loads(pickle.dumps(model)), language_models.tokens()), expected)
    adapters.detach()
    assert model.model.layers[0].self_attn.config is model.config


# --- implementations of transformers ---------------------------------------------------------------------------------


def unpadding(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As flash attention does, it asks the module's config for its own name."""
    assert module.config._attn_implementation == "unpadding"  # type: ignore[union-attr]
    assert not module.training
    return sdpa_attention_forward(module, *args, **kwargs)  # type: ignore[return-value]


@pytest.fixture
def _unpadding() -> None:
    AttentionInterface.register("unpadding", unpadding)
    AttentionMaskInterface.register("unpadding", sdpa_mask)


@pytest.mark.usefixtures("_unpadding")
def test_any_implementation_has_an_attention_beside_it() -> None:
    model = language_models.build("Llama", attention="unpadding")
    run = lambda model: language_models.output(model, language_models.tokens(length=5))  # noqa: E731
    found, expected, adapters = doubled(model, run)
    torch.testing.assert_close(found, expected, **EXACT)
    check_mixes(adapters)
    with pytest.raises(AttachError, match="unpadding"):
        adapters.add("prefix", ak.Prefix())


# --- what is refused -------------------------------------------------------------------------------------------------


class KeysAlone(AttentionSeam):
    """As a third party wrote it before there was `attend`."""


def test_a_seam_that_knows_of_extend_alone_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    toys.register()
    monkeypatch.delattr(toys.ToySeam, "attend_refusal")
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    with pytest.raises(AttachError, match="ToySeam reaches the keys and values of an attention alone"):
        adapters.add("a", Double())
    assert not len(adapters)
    adapters.add("prefix", ak.Prefix(length=2))
    assert KeysAlone().attend_refusal(model)


def test_a_type_that_does_neither_is_refused() -> None:
    toys.register()
    config = type("Neither", (Double,), {"build": lambda self, point: DoubleValues()})
    with pytest.raises(IncompatibleTargetError, match="defines neither extend nor attend"):
        ak.Adapters(toys.ToyModel()).add("a", config())


@pytest.mark.parametrize("wrong", ["shape", "query", "project"])
def test_what_breaks_the_contract_is_told(wrong: str) -> None:
    class Wrong(ak.AdapterModule):
        def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Any) -> Tensor:
            return {
                "shape": lambda: base(query)[:, :, :1],
                "query": lambda: base(query.clone()),
                "project": lambda: base.project(query)[0],
            }[wrong]()

    model = diffusion_models.flux() if wrong == "project" else toys.ToyModel().eval()
    toys.register()
    ak.Adapters(model).add("a", type("Made", (Double,), {"build": lambda self, point: Wrong()})())
    run = diffusion_models.run if wrong == "project" else lambda model: model(toys.ids())
    error = {"shape": PluginError, "query": ValueError, "project": AttachError}[wrong]
    with pytest.raises(error, match={"shape": "attend at", "query": "base.query", "project": "source"}[wrong]):
        run(model)


def test_older_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_models.build("Llama")
    monkeypatch.delattr(transformers.models.llama.modeling_llama, "eager_attention_forward")
    with pytest.raises(AttachError, match="attention interface"):
        ak.Adapters(model).add("a", Double())
