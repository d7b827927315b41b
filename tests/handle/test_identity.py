"""Whether what was adapted is still there: modules that others replace, wrap, cut off, tie and write to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import adapterkit as ak
from adapterkit import errors
from adapterkit.mapping.structure import named_base_modules
from adapterkit.testing import toys
from tests.values import randomize


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def adapted(targets: str = "attn.* head", name: str = "a", layers: int = 2) -> tuple[Any, ak.Adapters]:
    model: Any = toys.ToyModel(layers=layers).double().eval()
    adapters = ak.Adapters(model)
    adapters.add(name, ak.LoRA(rank=2, targets=targets))
    randomize(adapters, name)
    return model, adapters


def head() -> nn.Linear:
    return nn.Linear(toys.WIDTH, 3).double()


REPLACEMENTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "head": ("toy.head", lambda model: setattr(model, "head", head())),
    "layer deep inside": ("toy.blocks.1.attn.qkv", lambda model: setattr(model.blocks[1].attn, "qkv", nn.Identity())),
    "layers cut": ("toy.blocks.1", lambda model: setattr(model, "blocks", model.blocks[:1])),
    "layers exchanged": ("toy.blocks.0", lambda model: setattr(model, "blocks", model.blocks[::-1])),
    "layer deleted": ("toy.blocks.1.attn.proj", lambda model: delattr(model.blocks[1].attn, "proj")),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_a_replaced_module_is_named_by_every_verb_and_detaching_still_works(what: str, tmp_path: Path) -> None:
    path, replace = REPLACEMENTS[what]
    model, adapters = adapted()
    old = [module for _, module in named_base_modules(model)]
    replace(model)
    for verb in (
        adapters.report,
        adapters.merge,
        adapters.bake,
        lambda: adapters.train("a"),
        lambda: adapters.save("a", tmp_path / "a.safetensors"),
        lambda: adapters.checkpoint("a"),
        lambda: adapters.add("b", ak.LoRA(rank=2, targets="attn.q")),
        lambda: model(toys.ids()),
    ):
        with pytest.raises(errors.ReplacedError, match=path):
            verb()
    assert list(adapters) == ["a"]
    adapters.detach()
    assert not any("adapterkit" in key for module in [*old, *model.modules()] for key in module.state_dict())
    assert {type(module) for module in old} == {type(module) for module in toys.ToyModel().modules()}
    assert len(adapters) == 0


def test_a_switch_notices_what_is_next_to_the_root_and_the_next_forward_the_rest() -> None:
    model, adapters = adapted(layers=8)
    model(toys.ids())
    kept, model.head = model.head, head()
    with pytest.raises(errors.ReplacedError, match=r"toy\.head was replaced by another Linear after 'a'"):
        adapters.activate({"a": 0.5})
    with pytest.raises(errors.ReplacedError):
        model(toys.ids())  # though nothing was switched
    model.head = kept
    model.blocks[7].attn.qkv = nn.Linear(8, 24).double()
    adapters.activate({"a": 0.5})
    with pytest.raises(errors.ReplacedError, match="qkv"):
        model(toys.ids())
    with adapters.disabled():
        model(toys.ids())  # nothing acts, so nothing is missing


def test_putting_the_module_back_mends_it() -> None:
    model, adapters = adapted()
    y, old = model(toys.ids()), model.head
    model.head = head()
    with pytest.raises(errors.ReplacedError):
        adapters.report()
    model.head = old
    adapters.report()
    assert torch.equal(model(toys.ids()), y)


def test_wrappers_that_answer_for_what_they_wrap_hide_nothing() -> None:
    model, adapters = adapted("attn.*")
    y = model(toys.ids())
    base = toys.ToyModel().double().eval()(toys.ids())
    for at, block in enumerate(model.blocks):
        model.blocks[at] = checkpoint_wrapper(block)
    assert torch.equal(model(toys.ids()), y)
    adapters.report()
    with adapters.merged():
        assert torch.allclose(model(toys.ids()), y)
    adapters.detach()
    assert torch.equal(model(toys.ids()), base)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_class_that_was_changed_stays_and_computes_the_base_when_detaching_is_forced() -> None:
    model, adapters = adapted("head attn.o", layers=1)
    twin: Any = toys.ToyModel(layers=1).double().eval()
    for one in (model, twin):
        parametrize.register_parametrization(one.blocks[0].attn.proj, "bias", Double())
    with pytest.raises(errors.StateError, match=r"attn\.proj was changed .* detach\(force=True\)"):
        adapters.detach()
    with pytest.warns(UserWarning, match=r"left as they are: the class of toy\.blocks\.0\.attn\.proj"):
        adapters.detach(force=True)
    assert len(adapters) == 0
    assert torch.equal(model(toys.ids()), twin(toys.ids()))
    assert list(model.state_dict()) == list(twin.state_dict())


# -- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["embed.tokens", "head", "embed.tokens head"])
@pytest.mark.parametrize("tied_to", ["head", "embed"])
def test_a_tie_while_merged_is_undone(targets: str, tied_to: str) -> None:
    model, adapters = adapted(targets)
    own = model.embed.weight
    base = toys.ToyModel().double().eval()(toys.ids())
    adapters.merge()
    if tied_to == "head":
        model.head.weight = model.embed.weight
    else:
        model.embed.weight = model.head.weight
    adapters.unmerge()
    adapters.detach()
    assert model.head.weight is own
    assert model.embed.weight is own
    assert torch.equal(model(toys.ids()), base)


def load(model: nn.Module) -> None:
    model.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    merged = ("attn.proj.weight", "mlp.up.weight")
    tensors = {key: tensor * (1.5 if key.endswith(merged) else 1) for key, tensor in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)


@pytest.mark.parametrize(("write", "told"), [(load, "was written to"), (assign, "was replaced by another")])
def test_weights_that_were_loaded_while_merged_are_not_lost_in_silence(
    write: Callable[[nn.Module], None], told: str
) -> None:
    model, adapters = adapted("attn.o mlp.up")
    base = {key: p.clone() for key, p in model.named_parameters() if "adapterkit" not in key}
    adapters.merge()
    write(model)
    merged = model(toys.ids())
    for verb in (adapters.unmerge, adapters.detach):
        with pytest.raises(errors.StateError, match=f"cannot unmerge: the merged weight of toy.blocks.0.*{told}"):
            verb()
    assert torch.equal(model(toys.ids()), merged)
    adapters.unmerge(force=True)
    assert all(torch.equal(model.get_parameter(key), value) for key, value in base.items())


def test_a_detach_by_force_gives_back_the_weights_and_tells_what_was_lost() -> None:
    model, adapters = adapted("attn.o")
    twin = toys.ToyModel().double().eval()
    adapters.merge()
    load(model)
    with pytest.warns(UserWarning, match="the merged weight of toy.blocks.0.attn.proj was written to"):
        adapters.detach(force=True)
    assert torch.equal(model(toys.ids()), twin(toys.ids()))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)])
def test_a_cast_there_and_back_while_merged(dtypes: tuple[torch.dtype, ...]) -> None:
    model, adapters = adapted("attn.o")
    twin: Any = toys.ToyModel().double()
    adapters.merge()
    for dtype in dtypes:
        model.to(dtype)
    adapters.unmerge()
    expected = twin.blocks[0].attn.proj.weight.to(dtypes[-1])
    assert torch.equal(model.blocks[0].attn.proj.weight, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_unmerges(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, adapters = adapted("attn.o embed.tokens")
    load(model)
    adapters.merge()
    twin = copied(model)
    adapters.unmerge()
    ak.Adapters(twin).unmerge()
    assert torch.equal(twin(toys.ids()), model(toys.ids()))


# -- resized ----------------------------------------------------------------------------------------------------------


def resize(model: Any, rows: int, *, tied: bool = True) -> None:
    """As transformers does: the embedding's weight in place, and a new head that begins with the old one's rows."""
    embed = model.embed
    table = torch.randn(rows, toys.WIDTH).double()
    known = min(rows, len(embed.weight))
    table[:known] = embed.weight.data[:known]
    embed.weight.data, embed.num_embeddings = table, rows
    if tied:
        model.head.weight, model.head.out_features = embed.weight, rows
        return
    fresh = nn.Linear(toys.WIDTH, rows, bias=False).double().requires_grad_(model.head.weight.requires_grad)
    fresh.weight.data[:known] = model.head.weight.data[:known]
    model.head = fresh


CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": ak.LoRA(rank=2, targets="embed.tokens head"),
    "dora": ak.DoRA(rank=2, targets="head"),
    "a whole head": ak.Trainable("head"),
    "a whole embedding": ak.Trainable("embed.tokens"),
}


def untied(config: ak.AdapterConfig, *, tied: bool) -> tuple[Any, ak.Adapters]:
    model: Any = toys.ToyModel(layers=1).double().eval()
    if not tied:
        model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    return model, adapters


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_act_on_where_a_vocabulary_has_grown(config: ak.AdapterConfig, tied: bool) -> None:
    model, adapters = untied(config, tied=tied)
    ids, more = toys.ids(), torch.full((1, 2), toys.VOCABULARY + 1)
    y, known = model(ids), toys.VOCABULARY
    with adapters.disabled():
        base = model(ids)
    resize(model, known + 3, tied=tied)
    torch.testing.assert_close(model(ids)[..., :known], y, rtol=1e-10, atol=1e-10)
    with adapters.disabled():
        torch.testing.assert_close(model(ids)[..., :known], base, rtol=1e-10, atol=1e-10)
        rows = model.embed(more)
    z = model(torch.cat([ids, more.expand(len(ids), -1)], dim=1))
    assert torch.equal(model.embed(more), rows)  # what is new is the base's
    with adapters.merged():
        both = model(torch.cat([ids, more.expand(len(ids), -1)], dim=1))
        torch.testing.assert_close(both, z, rtol=1e-10, atol=1e-10)
    model(ids).sum().backward()
    assert any(parameter.grad is not None for parameter in adapters.parameters())
    with pytest.raises(errors.AttachError, match="was resized after adapters had been attached"):
        adapters.add("b", config)
    adapters.detach()
    torch.testing.assert_close(model(ids)[..., :known], base, rtol=1e-10, atol=1e-10)
    assert model.embed.weight.requires_grad
    assert not any("adapterkit" in key for key in model.state_dict())
    adapters.add("b", config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", ["embed.tokens", "head", "embed.tokens head"])
def test_rows_that_come_while_merged_stay(targets: str, tied: bool) -> None:
    model, adapters = untied(ak.LoRA(rank=2, targets=targets), tied=tied)
    embed, head = model.embed.weight.detach().clone(), model.head.weight.detach().clone()
    y, known = model(toys.ids()), toys.VOCABULARY
    adapters.merge()
    resize(model, known + 3, tied=tied)
    if tied:
        with pytest.raises(errors.StateError, match=r"embed.weight and head.weight were tied again .* unmerge\(\)"):
            model(toys.ids())
    else:
        torch.testing.assert_close(model(toys.ids())[..., :known], y, rtol=1e-10, atol=1e-10)
    adapters.unmerge()
    assert model.embed.weight.shape == model.head.weight.shape == (known + 3, toys.WIDTH)
    assert torch.equal(model.embed.weight[:known], embed)
    assert torch.equal(model.head.weight[:known], head)
    adapters.detach()


@pytest.mark.parametrize("targets", ["embed.tokens", "head"])
def test_a_vocabulary_that_has_shrunk_is_told(targets: str) -> None:
    model, adapters = untied(ak.LoRA(rank=2, targets=targets), tied=True)
    model(toys.ids())
    resize(model, 5)
    for verb in (adapters.merge, adapters.report, lambda: model(toys.ids() % 5)):
        with pytest.raises(errors.ReplacedError, match=r"is \(5, 8\) now, and 'a' was made for \(11, 8\)"):
            verb()
    adapters.detach()


def test_another_head_of_the_same_size_is_another_head() -> None:
    model, adapters = untied(ak.LoRA(rank=2, targets="head"), tied=False)
    model.head = nn.Linear(toys.WIDTH, toys.VOCABULARY, bias=False).double()
    with pytest.raises(errors.ReplacedError, match="head was replaced"):
        model(toys.ids())
    adapters.detach()
