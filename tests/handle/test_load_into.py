"""Values into an adapter that is there: the same parameters, and nothing changed where anything does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.values import randomize

LORA = ak.LoRA(rank=2, targets="attn.* mlp.up")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    toys.register()


def toy(config: ak.AdapterConfig = LORA, seed: int = 0, name: str = "x", layers: int = 2) -> ak.Adapters:
    adapters = ak.Adapters(toys.ToyModel(layers))
    adapters.add(name, config)
    randomize(adapters, name, seed)
    return adapters


def values(adapters: ak.Adapters, name: str = "x") -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in adapters.state_dict(name).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("config", [LORA, ak.Compacter(n=2), ak.AdaLoRA(rank=2), ak.Prefix(length=2)])
def test_values_go_into_the_parameters_that_are_there(config: ak.AdapterConfig, tmp_path: Path) -> None:
    theirs, mine = toy(config, 1), toy(config, 2)
    for key, buffer in theirs.state_dict("x").items():
        if key.endswith("/importance"):  # of AdaLoRA: buffers come along
            buffer.fill_(0.5)
    path = theirs.save("x", tmp_path / "a.safetensors", metadata={"trigger": "ink"})
    before = [*mine.parameters("x")]
    report = mine.load_into("x", path)
    assert all(now is then for now, then in zip(mine.parameters("x"), before, strict=True))
    assert all(parameter.requires_grad for parameter in before)
    assert same(values(mine), values(theirs))
    assert (report.name, mine.active, mine.metadata("x")) == ("x", {"x": 1.0}, {"trigger": "ink"})
    ids = toys.ids()
    assert torch.equal(mine._mapped.components["toy"].root(ids), theirs._mapped.components["toy"].root(ids))


def test_an_optimizer_goes_on_with_them(tmp_path: Path) -> None:
    adapters = toy()
    path = adapters.save("x", tmp_path / "a.safetensors")
    optimizer = torch.optim.SGD(adapters.parameters("x"), lr=0.1)
    start = values(adapters)
    for _ in range(2):
        adapters.load_into("x", path)
        assert same(values(adapters), start)
        for parameter in adapters.parameters("x"):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not same(values(adapters), start)


def test_a_file_of_several_gives_the_one_of_the_name(tmp_path: Path) -> None:
    theirs = toy(seed=1)
    theirs.add("y", ak.LoRA(rank=2, targets="attn.* mlp.up"))
    randomize(theirs, "y", 3)
    path = theirs.save(["x", "y"], tmp_path / "both.safetensors")
    mine = toy(name="y")
    mine.load_into("y", path)
    assert same(values(mine, "y"), values(theirs, "y"))
    mine.add("z", LORA)
    with pytest.raises(errors.UnsupportedFileError, match="x, y"):
        mine.load_into("z", path)


@pytest.mark.parametrize(
    ("config", "error", "told"),
    [
        (ak.DoRA(rank=2, targets="attn.* mlp.up"), errors.AdapterMismatchError, "holds DoRA, and the adapter here is"),
        (
            ak.LoRA(rank=2, alpha=8.0, targets="attn.* mlp.up"),
            errors.AdapterMismatchError,
            "alpha 8.0 there, None here",
        ),
        (ak.LoRA(rank=3, targets="attn.* mlp.up"), errors.AdapterMismatchError, "rank 3 there, 2 here"),
        (ak.LoRA(rank=2, targets="attn.*"), errors.MissingKeysError, "mlp.up"),
        (ak.LoRA(rank=2, targets="attn.* mlp.up mlp.down"), errors.UnexpectedKeysError, "mlp.down"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    config: ak.AdapterConfig, error: type[Exception], told: str, tmp_path: Path
) -> None:
    path = toy(config, 1).save("x", tmp_path / "a.safetensors")
    mine = toy()
    before = values(mine)
    with pytest.raises(error, match=told):
        mine.load_into("x", path)
    assert same(values(mine), before)


def test_settings_of_single_points_are_compared_there(tmp_path: Path) -> None:
    everywhere = {key: {} for key in toy()._attached("x").points}
    one = next(iter(everywhere))
    path = toy(ak.LoRA(rank=2, settings=everywhere), 1).save("x", tmp_path / "a.safetensors")
    mine = toy()
    mine.load_into("x", path)  # settings that say nothing but where are no other config
    other = toy(ak.LoRA(rank=2, settings={**everywhere, one: {"alpha": 4.0}}), 1)
    with pytest.raises(errors.AdapterMismatchError, match=r"alpha 4\.0 there"):
        mine.load_into("x", other.save("x", tmp_path / "b.safetensors"))


def test_another_base_is_refused_and_unstrict_takes_what_there_is(tmp_path: Path) -> None:
    path = toy(seed=1, layers=1).save("x", tmp_path / "a.safetensors")
    mine = toy()
    before = values(mine)
    with pytest.raises(errors.BaseMismatchError):
        mine.load_into("x", path)
    assert same(values(mine), before)
    with pytest.warns(UserWarning, match="made for another base|no tensors for"):
        report = mine.load_into("x", path, strict=False)
    changed = [key for key, value in values(mine).items() if not torch.equal(value, before[key])]
    assert report.notes
    assert changed
    assert all(".0/" in key for key in changed)


def test_a_value_of_the_wrong_shape_or_beyond_the_dtype_changes_nothing() -> None:
    mine, theirs = toy(), toy(seed=1)
    before = values(mine)
    whole = theirs.checkpoint("x")
    last = list(whole.tensors)[-1]
    for made, error in (
        (lambda tensor: tensor[:-1], errors.ShapeMismatchError),
        (lambda tensor: tensor.fill_(float("nan")), errors.NonFiniteError),
    ):
        parts = {**whole.tensors, last: {name: made(tensor.clone()) for name, tensor in whole.tensors[last].items()}}
        with pytest.raises(error):
            _refill(mine, whole.replace(tensors=parts))
        assert same(values(mine), before)
    for parameter in mine.parameters("x"):
        parameter.data = parameter.data.half()
    before = values(mine)
    parts = {**whole.tensors, last: {name: tensor.fill_(1e30) for name, tensor in whole.tensors[last].items()}}
    with pytest.raises(errors.NonFiniteError, match=r"beyond torch\.float16"):
        _refill(mine, whole.replace(tensors=parts))
    assert same(values(mine), before)


def _refill(adapters: ak.Adapters, checkpoint: ak.Checkpoint) -> None:
    from adapterkit.handle.refilling import refill

    refill(adapters._attached("x"), checkpoint, adapters._mapped, adapters.points(), True, None)


def test_what_is_merged_or_absent_is_refused(tmp_path: Path) -> None:
    adapters = toy()
    path = adapters.save("x", tmp_path / "a.safetensors")
    with pytest.raises(errors.UnknownNameError):
        adapters.load_into("y", path)
    with adapters.merged(), pytest.raises(errors.StateError, match="unmerge"):
        adapters.load_into("x", path)
    adapters.load_into("x", path)
