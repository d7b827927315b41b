"""What can act beside what, and for which rows and tokens: refused where it is chosen, never in a forward."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import families, models, toys
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    adapters = ak.Adapters(model)
    configs = {
        "lora": ak.LoRA(rank=2, targets="all head"),
        "other": ak.LoRA(rank=2, targets="attn.o"),
        "classes": ak.Trainable("head", outputs=3),
        "more": ak.Trainable("head", outputs=4),
    }
    for i, (name, config) in enumerate(configs.items()):
        adapters.add(name, config)
        randomize(adapters, name, i)
    return adapters


def run(model: nn.Module, adapters: ak.Adapters, choice: object) -> Tensor:
    with adapters.activated(choice):  # type: ignore[arg-type]
        return model(X)


@pytest.mark.parametrize(
    "choice",
    [
        ["classes", "lora"],  # LoRA acts at the head too
        ["classes", "more"],
        ak.Average("classes", "other"),
        ak.Parallel("classes", "classes"),
        ak.Stack("classes", "lora"),
        ak.Split({"classes": (0, 2), "other": (2, None)}),
        {"classes": 0.5},
        {"classes": {"*": -1.0}},
    ],
)
def test_what_replaces_a_weight_acts_alone(model: toys.ToyModel, adapters: ak.Adapters, choice: object) -> None:
    before = model(X)
    for attempt in (adapters.activate, adapters.merge):
        with pytest.raises(errors.ConfigError, match="'classes'"):
            attempt(choice)  # type: ignore[arg-type]
    assert torch.equal(model(X), before)


def test_it_acts_beside_what_is_elsewhere(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    beside = run(model, adapters, ["classes", "other"])
    assert beside.shape[-1] == 3
    assert torch.equal(run(model, adapters, ak.Parallel("classes", "other")), beside)
    assert torch.equal(run(model, adapters, ak.Stack("other", "classes")), beside)
    assert torch.equal(run(model, adapters, {"classes": 1, "lora": {"head": 0.0, "*": 0.0}, "other": 1}), beside)


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompted() -> ak.Adapters:
    """A prompt of blocks beside what counts positions, and beside what does not."""
    families.register()
    [example] = [one for one in models.EXAMPLES if one.name == "vision"]
    adapters = ak.Adapters(example.make())
    adapters.add("prompt", ak.Prompt(length=2, targets="prompt.layer"))
    adapters.add("ends", ak.ReFT(rank=2, prefix=1))
    adapters.add("all", ak.ReFT(rank=2))
    adapters.add("union", ak.Union((ak.ReFT(rank=2, suffix=1), ak.LoRA(rank=2))))
    adapters.add("lora", ak.LoRA(rank=2, targets="mlp.up"))
    return adapters


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (["prompt", "ends"], "'ends'"),
        (ak.Parallel("prompt", "ends"), "'ends'"),
        (["union", "prompt"], "'union'"),
        (["prompt", ak.Split({"lora": (0, 2)})], "Split"),
    ],
)
def test_positions_are_not_counted_where_some_are_added(prompted: ak.Adapters, choice: object, named: str) -> None:
    prompted.activate("lora")
    with pytest.raises(errors.RoutingError, match=f"{named}.* counts the positions .*'prompt'"):
        prompted.activate(choice)  # type: ignore[arg-type]
    assert prompted.active == {"lora": 1.0}
    prompted.activate(["prompt", "all", "lora"])


# -- spans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"a": (0, 3), "b": (2, None)}, "overlap"),
        ({"a": (-3, None), "b": (-2, -1)}, "overlap"),
        ({"a": (0, 0)}, "no token"),
        ({"a": (-1, -2)}, "no token"),
        ({"a": (0, None), "b": (4, None)}, "overlap"),
    ],
)
def test_spans_lie_apart(spans: dict[str, tuple[int, int | None]], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        ak.Split(spans)  # type: ignore[arg-type]


def test_spans_from_both_ends_meet_in_a_short_sequence(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ak.LoRA(rank=2, targets="mlp.up"))
        randomize(adapters, name, i)
    with adapters.activated(ak.Split({"a": (0, 3), "b": (-2, None)})):
        model(X)
        with pytest.raises(errors.RoutingError, match="overlap in a sequence of 4 tokens"):
            model(X[:, :4])


# -- rows -----------------------------------------------------------------------------------------------------------


def test_what_overflows_in_a_row_does_not_reach_another(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = run(model, adapters, "other")
    with torch.no_grad():
        for module in adapters.modules("lora").values():
            for parameter in module.parameters():
                parameter.fill_(1e200)
    with adapters.routed(["lora", "other", None]):
        rows = model(X)
    assert not rows[0].isfinite().all()
    assert torch.allclose(rows[1], expected[1], rtol=1e-10)
    assert torch.equal(rows[2], run(model, adapters, None)[2])


@pytest.mark.parametrize("routes", [["lora", "other", None], ["other", None, "lora"], [None, "other", "lora"]])
def test_rows_ask_for_adapters_in_the_order_in_which_they_were_attached(
    model: toys.ToyModel, adapters: ak.Adapters, routes: list[str | None]
) -> None:
    with adapters.routed(routes):
        assert list(adapters.active) == ["lora", "other"]  # another order would be another program


# -- blocks and weights that are merged -----------------------------------------------------------------------------


def test_nothing_acts_twice_on_merged_weights(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = run(model, adapters, "lora")
    adapters.activate("other")
    before = model(X)
    with adapters.activated("lora"):
        adapters.merge()
        assert torch.allclose(model(X), expected, rtol=1e-10)
        adapters.unmerge()
        assert torch.equal(model(X), expected)
    with adapters.activated("lora"):
        adapters.merge("lora")
    assert torch.allclose(model(X), expected, rtol=1e-10)  # the block ended; the merge did not
    assert torch.allclose(copy.deepcopy(model)(X), expected, rtol=1e-10)
    adapters.unmerge()
    assert torch.equal(model(X), before)


def test_a_step_does_not_move_merged_weights(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.activate({"lora": lambda point, step: 1.0 + step})
    adapters.merge()
    with pytest.raises(errors.StateError, match="unmerge"):
        adapters.at_step(1)
    adapters.unmerge()
    adapters.at_step(1)
    assert torch.equal(model(X), run(model, adapters, {"lora": 2.0}))


def test_what_a_block_hides_is_not_set_inside_it(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    with adapters.activated("lora"):
        for attempt in (lambda: adapters.activate("other"), lambda: adapters.add("new", ak.LoRA())):
            with pytest.raises(errors.StateError, match="leave it first"):
                attempt()
    assert "new" not in adapters


def test_what_is_removed_in_a_block_acts_no_more(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    expected = run(model, adapters, "other")
    adapters.activate(["lora", "other"])
    with adapters.activated(["lora", "other"]):
        adapters.remove("lora")
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


# -- what a switch looks at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["lora", ["lora", "classes"], {"lora": 0.5, "other": -1}, ak.Stack("other", "lora")])
def test_a_switch_walks_no_points(model: toys.ToyModel, adapters: ak.Adapters, choice: object) -> None:
    """A walk over 10,000 points takes milliseconds: what they tell together is told when an adapter is attached."""
    walks: list[str] = []

    class Watched(dict[str, object]):
        def values(self) -> object:  # type: ignore[override]
            walks.append("values")
            return super().values()

        def items(self) -> object:  # type: ignore[override]
            walks.append("items")
            return super().items()

        def __iter__(self) -> object:  # type: ignore[override]
            walks.append("iter")
            return super().__iter__()

    for one in adapters._state.adapters.values():
        object.__setattr__(one, "points", Watched(one.points))
        object.__setattr__(one, "modules", Watched(one.modules))
    walks.clear()
    told = contextlib.nullcontext() if choice != ["lora", "classes"] else pytest.raises(errors.ConfigError)
    with told:
        adapters.activate(choice)  # type: ignore[arg-type]
    with adapters.routed(["lora", None, "other"]), adapters.activated("other"), adapters.disabled():
        pass
    assert walks == []
