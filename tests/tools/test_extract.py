"""What is extracted makes the tuned model of the base, but for the tail of each difference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import BaseMismatchError, TargetNotFoundError
from adapterkit.testing import models, toys
from adapterkit.tools.base import base_of, open_base
from adapterkit.tools.extract import extract
from adapterkit.tools.ranks import RankRule
from tests.backends.vision_models import pipeline
from tests.tools import adapters


def tuned_of(model: nn.Module, names: str = "weight", rank: int | None = None, seed: int = 0) -> nn.Module:
    """A copy with other parameters of these endings, by changes of full rank or a low one."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(names) and parameter.ndim > (rank is not None):
                change = torch.randn(parameter.shape, generator=generator) / 8
                if rank is not None:
                    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
                    change = ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(parameter.shape)
                parameter += change
    return tuned


def changes(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    own = dict(base.named_parameters())
    return {name: (p - own[name]).detach().double() for name, p in tuned.named_parameters()}


@pytest.fixture
def model() -> nn.Module:
    models.EXAMPLES[2].make()
    adapters.checkpoint(ak.LoRA(rank=1, targets="attn.q"))  # the toys are known
    return models.EXAMPLES[2].make()


def test_a_change_of_low_rank_comes_back(model: nn.Module):
    tuned = tuned_of(model, rank=2)
    found = extract(base_of(tuned), base_of(model), RankRule(rank=2), targets="*")
    assert found.error < 1e-5
    expected = {name: change for name, change in changes(model, tuned).items() if change.any()}
    made = adapters.changes(found.checkpoint, copy.deepcopy(model))
    assert made.keys() == expected.keys()
    for name, change in made.items():
        torch.testing.assert_close(change, expected[name], atol=1e-6, rtol=1e-4)
    assert {len(p.shape) for p in base_of(model).points if p.id in found.points} >= {2, 4}


def test_the_error_is_the_tail_and_what_is_left_of_biases_and_norms(model: nn.Module):
    tuned = tuned_of(model, "")
    expected = changes(model, tuned)
    found = extract(base_of(tuned), base_of(model), RankRule(rank=3))
    assert {"norm", "res.conv1"} <= {key.partition("@")[0] for key in found.others}
    for point in base_of(model).points:
        if point.id in found.points:
            values = torch.linalg.svdvals(expected[f"{point.path}.weight"].flatten(1))
            assert found.points[point.id].error == pytest.approx(float(values[3:].norm()), rel=1e-3, abs=1e-5)
    made = adapters.changes(found.checkpoint, copy.deepcopy(model))
    looked = {
        name: c for name, c in expected.items() if name in made or name.rpartition(".")[0] in _paths(model, found)
    }
    left = adapters.norm(adapters.less(looked, made)) / adapters.norm(looked)
    assert left == pytest.approx(found.error, rel=1e-3)


def _paths(model: nn.Module, found: object) -> set[str]:
    keys = {*found.points, *found.others}  # type: ignore[attr-defined]
    return {point.path for point in base_of(model).points if point.id in keys}


def test_biases_and_norms_exactly_where_they_are_asked_for(model: nn.Module):
    tuned = tuned_of(model, "")
    found = extract(base_of(tuned), base_of(model), RankRule(rank=100), targets="*", others=True)
    assert found.error < 1e-5
    assert not found.others
    made, expected = adapters.changes(found.checkpoint, copy.deepcopy(model)), changes(model, tuned)
    for name, change in expected.items():
        torch.testing.assert_close(made[name], change, atol=1e-5, rtol=1e-4)


def test_what_does_not_differ_is_left_out_and_rounding_can_be(model: nn.Module):
    tuned = tuned_of(model, "conv1.weight")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1e-4 * torch.rand(parameter.shape)
    keys = [{*extract(base_of(tuned), base_of(model), RankRule(rank=2), least=least).points} for least in (0.0, 1e-3)]
    assert {key.partition("@")[0] for key in keys[1]} == {"res.conv1"}
    assert len(keys[0]) > len(keys[1])
    with pytest.raises(BaseMismatchError, match="the same"):
        extract(base_of(model), base_of(model), RankRule(rank=2))


def test_ranks_by_rule(model: nn.Module):
    tuned = tuned_of(model, rank=2)
    found = extract(base_of(tuned), base_of(model), RankRule(error=1e-3))
    assert {one.rank for key, one in found.points.items() if "conv" not in key} == {2}


def test_a_state_dict_alone(model: nn.Module):
    tuned = tuned_of(model)
    state = {f"model.{name}": tensor.half() for name, tensor in tuned.state_dict().items()}
    shape = copy.deepcopy(model).to("meta")
    found = extract(base_of(shape, state), base_of(model), RankRule(rank=4))
    again = extract(base_of(tuned.half()), base_of(model), RankRule(rank=4))
    assert found.points == again.points


def test_models_in_files_with_their_text_encoder(tmp_path: Path):
    (tmp_path / "words").mkdir()
    torch.manual_seed(0)
    pipe = pipeline(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "base")
    for part in (pipe.unet, pipe.text_encoder):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter += torch.randn(parameter.shape) / 50
    pipe.save_pretrained(tmp_path / "tuned")
    bases = [open_base(str(tmp_path / name)) for name in ("tuned", "base")]
    found = extract(*bases, RankRule(rank=1000), metadata={"trigger": "ink"})
    assert {key.partition("@")[2].partition(".")[0] for key in found.points} == {"unet", "text_encoder"}
    assert set(found.checkpoint.base) == set(found.checkpoint.backends) == {"unet", "text_encoder"}
    again = type(pipe).from_pretrained(tmp_path / "base")
    handle = ak.Adapters(again)
    handle.install("a", found.checkpoint)
    handle.bake("a")
    for point in bases[1].points:
        if point.id in found.points:
            now, wanted = (getattr(each, point.component).get_submodule(point.path).weight for each in (again, pipe))
            torch.testing.assert_close(now, wanted, atol=1e-5, rtol=1e-4)
    assert found.checkpoint.metadata == {"trigger": "ink"}


def test_models_of_different_kinds_are_refused(model: nn.Module):
    with pytest.raises(BaseMismatchError, match="no such weights"):
        extract(base_of(toys.ToyModel()), base_of(model), RankRule(rank=2))
    with pytest.raises(TargetNotFoundError):
        extract(base_of(model), base_of(model), RankRule(rank=2), targets="attn.x")
