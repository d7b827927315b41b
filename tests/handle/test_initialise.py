"""Adapters that are attached on the meta device get the values of `add` once the base has its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys

CONFIGS = {
    "weights": ak.LoRA(rank=2, targets="*", alphas={"mlp.*": 3}),
    "of the base": ak.DoRA(rank=2, targets="attn.o mlp.up"),
    "principal": ak.LoRA(rank=2, init="pissa", targets="mlp.*"),
    "copies": ak.Trainable("norm head"),
    "attention": ak.Prefix(length=2),
    "vocabulary": ak.Prompt(length=2, init="vocabulary"),
    "shared": ak.Compacter(n=2),
    "several": ak.Union((ak.Invertible(), ak.Compacter(n=2, targets="mlp"))),
    "ranks": ak.AdaLoRA(targets="mlp.up"),
}


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


def base() -> dict[str, Tensor]:
    return toys.ToyModel().state_dict()


def on_meta(config: ak.AdapterConfig, seed: int = 3) -> tuple[nn.Module, ak.Adapters]:
    with torch.device("meta"):
        model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", config, seed=seed)
    return model, adapters


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_the_values_are_the_bits_that_a_real_model_gives(assign: bool) -> None:
    for kind, config in CONFIGS.items():
        if kind == "vocabulary":
            continue
        real = toys.ToyModel().eval()
        wanted = ak.Adapters(real)
        wanted.add("a", config, seed=3)
        model, adapters = on_meta(config)
        if not assign:
            model.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in adapters.parameters():
                    parameter.fill_(float("nan"))
        model.load_state_dict(base(), strict=False, assign=assign)
        if assign:
            model.get_submodule("head").weight = model.get_submodule("embed").weight
        with pytest.raises(errors.StateError, match=r"no values.*initialise\('a'\)"):
            model(toys.ids())
        with pytest.raises(errors.StateError, match=r"cannot merge 'a'.*no values.*initialise\('a'\)"):
            adapters.merge()
        before = {name: id(p) for name, p in model.named_parameters()}
        adapters.initialise()
        assert assign or before == {name: id(p) for name, p in model.named_parameters()}
        torch.testing.assert_close(adapters.state_dict("a"), wanted.state_dict("a"), rtol=0, atol=0, msg=kind)
        assert torch.equal(model(toys.ids()), real(toys.ids())), kind
        assert [p.requires_grad for p in adapters.parameters()] == [p.requires_grad for p in wanted.parameters()]
        ak.Adapters(copy.deepcopy(model)).detach()
        adapters.detach()
        assert model.state_dict().keys() == base().keys()


def test_what_a_call_has_planned_on_the_meta_device_is_looked_at_again() -> None:
    model, adapters = on_meta(CONFIGS["weights"])
    model(toys.ids().to("meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(base(), strict=False)
    with pytest.raises(errors.StateError, match="no values"):
        model(toys.ids())
    with adapters.disabled():
        model(toys.ids())
    with pytest.raises(errors.StateError, match="no values"):
        pickle.loads(pickle.dumps(model))(toys.ids())


def test_a_state_dict_with_the_adapter_in_it_gives_it_values(tmp_path: Path) -> None:
    real = toys.ToyModel().eval()
    ak.Adapters(real).add("a", CONFIGS["weights"], seed=1)
    model, adapters = on_meta(CONFIGS["weights"])
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    assert torch.equal(model(toys.ids()), real(toys.ids()))
    adapters.initialise()  # nothing waits
    assert torch.equal(model(toys.ids()), real(toys.ids()))
    adapters.initialise("a")  # as it was added here
    assert not torch.equal(
        adapters.state_dict("a")["attn.q@toy.0/A"], ak.Adapters(real).state_dict("a")["attn.q@toy.0/A"]
    )


def test_an_adapter_of_a_file_gets_its_values_from_there(tmp_path: Path) -> None:
    real = ak.Adapters(toys.ToyModel())
    real.add("a", CONFIGS["weights"])
    path = real.save("a", tmp_path / "a")
    with torch.device("meta"):
        model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.load(path, "a")
    adapters.activate("a")
    model.to_empty(device="cpu")
    model.load_state_dict(base(), strict=False)
    with pytest.raises(errors.StateError, match="no values"):
        adapters.save("a", tmp_path / "b")
    with pytest.raises(errors.StateError, match=r"load_into\('a', path\)"):
        adapters.initialise()
    adapters.load_into("a", path)
    torch.testing.assert_close(adapters.state_dict("a"), real.state_dict("a"), rtol=0, atol=0)
    model(toys.ids())
    adapters.save("a", tmp_path / "b")


def test_a_base_on_the_meta_device_has_nothing_to_start_from() -> None:
    model, adapters = on_meta(CONFIGS["weights"])
    with pytest.raises(errors.StateError, match="give the base its values first"):
        adapters.initialise("a")
    with pytest.raises(errors.UnknownNameError):
        adapters.initialise("b")
    with torch.device("meta"):
        assert model(toys.ids().to("meta")).is_meta
