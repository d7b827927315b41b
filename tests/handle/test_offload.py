"""accelerate's hooks around a model, which dispatch or offload its layers: before adapters are attached, and after."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.backend import CHILD, SITE
from adapterkit.testing import toys
from tests.values import randomize

CPU = torch.device("cpu")
CONFIGS = {
    "weights": ak.LoRA(rank=2, targets="attn.{q,v,o} mlp.* conv head"),
    "embedding": ak.LoRA(rank=2, targets="embed.tokens"),
    "start values of the base": ak.DoRA(rank=2, targets="attn.o mlp.up"),
    "principal components": ak.LoRA(rank=2, init="pissa", targets="mlp.*"),
    "copies of the base": ak.Trainable("norm"),
    "attention": ak.Prefix(length=2),
    "sublayers": ak.Bottleneck(targets="attn mlp", reduction=2),
    "shared": ak.Compacter(n=2),
    "blocks": ak.ReFT(rank=2),
    "tokens": ak.Invertible(),
    "several": ak.Union((ak.LoRA(rank=1, targets="mlp.up"), ak.Prefix(length=1))),
}


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """A layer on the disk, the rest where it computes: what `device_map="auto"` does with a large model."""
    places = dict.fromkeys(("embed", "blocks.0", "norm", "head"), "cpu")
    return dispatch_model(model, {**places, "blocks.1": "disk"}, "cpu", offload_dir=folder)  # pyright: ignore


HOOKS: dict[str, Callable[[nn.Module, Path], object]] = {
    "dispatch": dispatched,
    "cpu": lambda model, _: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "whole": lambda model, _: cpu_offload_with_hook(model, CPU),
}


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def model() -> toys.ToyModel:
    return toys.ToyModel().eval()


def untied() -> toys.ToyModel:
    """Hooks break ties, whoever adapts the model."""
    made = model()
    made.head.weight = nn.Parameter(made.head.weight.detach().clone())
    return made


def adapted(model: nn.Module, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    return adapters


def graph(model: nn.Module) -> list[tuple[type, dict[str, Any]]]:
    """Every module's class, with the functions and hooks that it holds itself."""
    return [(type(one), {k: v for k, v in one.__dict__.items() if callable(v)}) for one in model.modules()]


@pytest.mark.parametrize("hooks", HOOKS)
def test_every_kind_of_adapter_acts_beneath_hooks_and_leaves_them_as_they_were(hooks: str, tmp_path: Path) -> None:
    x = toys.ids()
    for kind, config in CONFIGS.items():
        wanted = adapted(plain := untied(), config)
        y, file = plain(x), wanted.save("a", tmp_path / kind)
        HOOKS[hooks](hooked := untied(), tmp_path)
        before, base = graph(hooked), hooked(x)
        adapters = adapted(hooked, config)
        torch.testing.assert_close(hooked(x), y, msg=kind)
        assert not any(parameter.is_meta for parameter in adapters.parameters()), kind
        adapters.load(file, "b")
        adapters.activate("b")
        torch.testing.assert_close(hooked(x), y, msg=kind)
        torch.testing.assert_close(adapters.state_dict("b"), wanted.state_dict("a"))
        adapters.save("b", tmp_path / "again")
        adapters.detach()
        assert torch.equal(hooked(x), base), kind
        assert graph(hooked) == before, kind
        assert all(SITE not in one.__dict__ and CHILD not in one._modules for one in hooked.modules())


@pytest.mark.filterwarnings("ignore:the state dict of a part of a model")  # accelerate counts what is in each
@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_that_come_after_the_adapter_leave_it_where_it_acts(hooks: str, tmp_path: Path) -> None:
    x = toys.ids()
    for kind, config in CONFIGS.items():
        adapters = adapted(one := untied(), config)
        y = one(x)  # everything that is computed once has been
        values = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
        HOOKS[hooks](one, tmp_path / kind)
        torch.testing.assert_close(one(x), y, msg=kind)
        torch.testing.assert_close(adapters.state_dict("a"), values)
        adapters.add("second", config)
        adapters.activate("a")
        torch.testing.assert_close(one(x), y, msg=kind)
        adapters.save(["a", "second"], tmp_path / "both")
        adapters.detach()
        one(x)


def test_hooks_may_go_while_an_adapter_is_attached() -> None:
    x, config = toys.ids(), CONFIGS["weights"]
    adapted(plain := untied(), config)
    cpu_offload(hooked := untied(), CPU)
    base, adapters = hooked(x), adapted(hooked, config)
    remove_hook_from_module(hooked, recurse=True)
    torch.testing.assert_close(hooked(x), plain(x))
    adapters.detach()
    assert torch.equal(hooked(x), base)
    up: Any = hooked.blocks[0].up
    assert up.forward.__func__ is nn.Linear.forward
    adapters = adapted(hooked, config)  # accelerate leaves the method on the instance
    torch.testing.assert_close(hooked(x), plain(x))
    cpu_offload(hooked, CPU)
    torch.testing.assert_close(hooked(x), plain(x))


def test_hooks_see_the_signature_that_the_forward_has() -> None:
    cpu_offload(hooked := untied(), CPU)
    adapted(hooked, CONFIGS["weights"])
    up: Any = hooked.blocks[0].up
    own = inspect.signature(nn.Linear(1, 1).forward)
    assert inspect.signature(up.forward) == inspect.signature(up._old_forward) == own


def test_another_kind_of_point_changes_the_class_beneath_the_same_hooks() -> None:
    """The head's weight is read at one point and the module called at the other."""
    x = toys.ids()
    cpu_offload(hooked := untied(), CPU)
    plain = untied()
    for one in (plain, hooked):
        adapters = ak.Adapters(one)
        for name, config in CONFIGS.items():
            adapters.add(name.split()[0] + str(len(adapters)), config)
            randomize(adapters, name.split()[0] + str(len(adapters) - 1))
    torch.testing.assert_close(hooked(x), plain(x))
    names = list(ak.Adapters(plain))
    for name in names[::2]:
        for one in (plain, hooked):
            ak.Adapters(one).remove(name)
    for one in (plain, hooked):
        ak.Adapters(one).activate(names[1])
    torch.testing.assert_close(hooked(x), plain(x))


def test_training_through_offloaded_layers_has_the_gradients_of_training_without() -> None:
    found = []
    for hook in (False, True):
        one = untied()
        if hook:
            cpu_offload(one, CPU)
        adapters = adapted(one, CONFIGS["weights"])
        one(toys.ids()).square().mean().backward()
        found.append([parameter.grad for parameter in adapters.parameters()])
    assert len(found[0]) > 10
    for plain, hooked in zip(*found, strict=True):
        torch.testing.assert_close(hooked, plain)


def test_a_hooked_model_with_an_adapter_can_be_copied() -> None:
    x = toys.ids()
    cpu_offload(hooked := untied(), CPU)
    adapted(hooked, CONFIGS["weights"])
    twin = copy.deepcopy(hooked)
    y = hooked(x)
    ak.Adapters(hooked).detach()
    torch.testing.assert_close(twin(x), y)
    ak.Adapters(twin).detach()
    assert torch.equal(twin(x), hooked(x))


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_weight_that_is_offloaded_is_not_merged_into(weight: float) -> None:
    adapters = adapted(one := untied(), CONFIGS["weights"])
    adapters.activate({"a": weight})
    y = one(toys.ids())
    cpu_offload(one, CPU)
    torch.testing.assert_close(one(toys.ids()), y)
    with pytest.raises(errors.NotMergeableError, match="offloaded"):
        adapters.merge()
    torch.testing.assert_close(one(toys.ids()), y)
    remove_hook_from_module(one, recurse=True)
    adapters.merge()
    torch.testing.assert_close(one(toys.ids()), y)


@torch.no_grad()
@pytest.mark.parametrize("gone", ["cpu", "disk", "meta"])
def test_weights_that_are_offloaded_after_a_merge_come_back_before_they_are_unmerged(gone: str, tmp_path: Path) -> None:
    base = model()
    x = toys.ids()
    before, bits = base(x), copy.deepcopy(base.state_dict())
    adapters = adapted(base, ak.LoRA(rank=2, targets="mlp.*"))
    adapters.merge()
    y = base(x)
    if gone == "meta":
        base.to("meta")
    else:
        HOOKS[gone](base, tmp_path)
        assert torch.equal(base(x), y)
    for verb in (adapters.unmerge, adapters.detach):
        for force in (False, True):
            with pytest.raises(errors.StateError, match=r"cannot unmerge: .* is offloaded, or on the meta device"):
                verb(force=force)
    if gone == "meta":
        return
    assert torch.equal(base(x), y)
    remove_hook_from_module(base, recurse=True)
    adapters.unmerge()
    torch.testing.assert_close(base(x), y)
    adapters.detach()
    assert torch.equal(base(x), before)
    assert all(torch.equal(bits[key], value) for key, value in base.state_dict().items())


def test_a_layer_that_is_dispatched_and_not_offloaded_is_merged_into(tmp_path: Path) -> None:
    dispatched(one := untied(), tmp_path)
    adapters = adapted(one, ak.LoRA(rank=2, targets="mlp.*@layer=0"))
    y = one(toys.ids())
    adapters.merge()
    torch.testing.assert_close(one(toys.ids()), y)
    adapters.unmerge()
    torch.testing.assert_close(one(toys.ids()), y)
    adapters.add("b", ak.LoRA(rank=2, targets="mlp.*"))
    with pytest.raises(errors.NotMergeableError, match=r"mlp.*toy\.1.*offloaded"):
        adapters.merge()


def test_what_is_offloaded_as_one_block_takes_nothing_new() -> None:
    """Such a hook would look for the adapter's tensors among those that it keeps."""
    one = untied()
    weights = {key: value.clone() for key, value in one.state_dict().items()}
    attach_align_device_hook(one, CPU, offload=True, weights_map=weights, preload_module_classes=["ToyBlock"])
    y, adapters = one(toys.ids()), ak.Adapters(one)
    for config in (CONFIGS["weights"], CONFIGS["sublayers"], CONFIGS["attention"]):
        with pytest.raises(errors.AttachError, match="as one block"):
            adapters.add("a", config)
    assert torch.equal(one(toys.ids()), y)
    adapters.add("a", ak.LoRA(rank=2, targets="head"))
    one(toys.ids())


def test_a_forward_that_hides_the_module_s_own_is_refused() -> None:
    one = model()
    one.blocks[1].up.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(errors.AttachError, match=r"blocks\.1\.up.*replaced"):
        ak.Adapters(one).add("a", CONFIGS["weights"])
    assert not len(ak.Adapters(one))
