"""Which backend speaks for a model: by class, most derived first; through wrappers; overridden by a hook."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from adapterkit import hookimpl
from adapterkit.errors import AmbiguousBackendError, PluginError, UnsupportedModelError
from adapterkit.plugins.manager import PluginManager
from adapterkit.plugins.matching import match, peel
from adapterkit.specs import BackendSpec


def model_of(*classes: str) -> nn.Module:
    """An instance of a class whose bases, most derived first, are named `"package:Class"`."""
    cls: type = nn.Module
    for package, _, name in (spelling.partition(":") for spelling in reversed(classes)):
        cls = type(name, (cls,), {"__module__": f"{package}.models.some_model"})
    return cls()


def families(manager: PluginManager) -> dict[str, BackendSpec]:
    """All backends but the one that takes any model."""
    return {name: spec for name, spec in manager.backends().items() if name != "generic"}


@pytest.mark.parametrize(
    ("classes", "backend"),
    [
        (
            ("transformers:LlamaForCausalLM", "transformers:LlamaPreTrainedModel", "transformers:PreTrainedModel"),
            "language",
        ),
        (("my_project:MyLlama", "transformers:LlamaModel", "transformers:LlamaPreTrainedModel"), "language"),
        (("transformers:BertModel", "transformers:BertPreTrainedModel"), "language"),
        (("transformers:CLIPTextModelWithProjection", "transformers:CLIPPreTrainedModel"), "clip_text"),
        (("transformers:ViTForImageClassification", "transformers:ViTPreTrainedModel"), "vit"),
        (("timm:VisionTransformer",), "timm_vit"),
        (("diffusers:UNet2DConditionModel", "diffusers:ModelMixin"), "unet"),
    ],
)
def test_a_model_is_matched_by_the_classes_that_it_derives_from(
    classes: tuple[str, ...], backend: str, manager: PluginManager
) -> None:
    assert manager.backend_for(model_of(*classes)).name == backend


@pytest.mark.parametrize("near", ["other:VisionTransformer", "timm_extra:VisionTransformer", "timm:VisionTransformers"])
def test_both_package_and_class_must_agree(near: str, manager: PluginManager) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"VisionTransformer.*Similar: VisionTransformer.*timm:VisionTransformer"
    ):
        match(model_of(near), families(manager))


def test_the_most_derived_claim_wins() -> None:
    specs = {
        "base": BackendSpec("base", "a:B", models=("lib:Base",)),
        "child": BackendSpec("child", "a:B", models=("lib:Other", "lib:Child")),
    }
    assert match(model_of("lib:Grandchild", "lib:Child", "lib:Base"), specs).name == "child"
    assert match(model_of("lib:Sibling", "lib:Base"), specs).name == "base"


def test_a_tie_asks_for_a_choice() -> None:
    specs = {name: BackendSpec(name, "a:B", models=("lib:Model",)) for name in ("one", "two")}
    with pytest.raises(AmbiguousBackendError, match=r"lib:Model is claimed by .*'one'.* and .*'two'.*backend='one'"):
        match(model_of("lib:Model"), specs)


def test_what_no_backend_knows_is_refused_with_the_families(manager: PluginManager) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no backend knows torch.nn.*Linear.*unet: diffusers:UNet2D"):
        match(nn.Linear(2, 2), families(manager))


def test_the_generic_backend_takes_what_no_family_claims(manager: PluginManager) -> None:
    assert manager.backend_for(nn.Linear(2, 2)).name == "generic"
    assert manager.backend_for(model_of("other:VisionTransformer")).name == "generic"
    assert manager.backend_for(model_of("mine:Model", "timm:VisionTransformer")).name == "timm_vit"


def bare(cls: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Wraps as `cls` does, without its constructor, which wants a process group and so a network."""

    def wrap(model: nn.Module) -> nn.Module:
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper.module = model
        return wrapper

    return wrap


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        bare(nn.parallel.DistributedDataParallel),
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
    ],
    ids=["compile", "data parallel", "ddp", "compile of data parallel", "data parallel of compile"],
)
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module], manager: PluginManager) -> None:
    model = model_of("timm:VisionTransformer")
    model.weight = nn.Parameter(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has views on wrapping
        wrapped = wrap(model)
    assert peel(wrapped) is model
    assert manager.backend_for(wrapped).name == "timm_vit"


def test_a_stranger_of_the_same_name_is_not_a_wrapper() -> None:
    model = model_of("mine:DataParallel")
    model.module = nn.Linear(1, 1)
    assert peel(model) is model


class Resolver:
    """A plug-in that answers for every model."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def adapterkit_resolve_backend(self, model: nn.Module) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class TestResolveHook:
    VIT = ("timm:VisionTransformer",)

    def test_a_hook_overrides_the_match(self, manager: PluginManager) -> None:
        manager.register(Resolver("unet"), name="mine")
        assert manager.backend_for(model_of(*self.VIT)).name == "unet"
        assert manager.backend_for(model_of("nobody:Knows")).name == "unet"

    def test_none_is_no_opinion_and_the_latest_is_asked_first(self, manager: PluginManager) -> None:
        for name, answer in [("first", "vit"), ("second", "unet"), ("third", None)]:
            manager.register(Resolver(answer), name=name)
        assert manager.backend_for(model_of(*self.VIT)).name == "unet"

    @pytest.mark.parametrize("answer", [RuntimeError("boom"), "no_such_backend", 3])
    def test_a_broken_answer_is_named_and_ignored(
        self, answer: object, manager: PluginManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager.register(Resolver(answer), name="mine")
        assert manager.backend_for(model_of(*self.VIT)).name == "timm_vit"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "'mine'" in record.getMessage()
        monkeypatch.setenv("ADAPTERKIT_STRICT_PLUGINS", "1")
        with pytest.raises(PluginError, match="plug-in 'mine': adapterkit_resolve_backend failed"):
            manager.backend_for(model_of(*self.VIT))

    def test_the_hook_sees_the_model_inside_its_wrapper(self, manager: PluginManager) -> None:
        seen: list[object] = []
        resolver = Resolver(None)
        hook = hookimpl(lambda model: seen.append(model), specname="adapterkit_resolve_backend")
        resolver.look = hook
        manager.register(resolver, name="mine")
        model = model_of(*self.VIT)
        manager.backend_for(nn.DataParallel(model))
        assert seen == [model]
