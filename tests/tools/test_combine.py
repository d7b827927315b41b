"""Combined adapters do what the weighted sum of what each does is."""

from __future__ import annotations

import pytest
import torch
from adapterkit_lycoris.loha import LoHa
from torch import Tensor

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import BaseMismatchError, BaseNeededError, ConfigError, NotMergeableError
from adapterkit.testing import models, toys
from adapterkit.tools import sparse
from adapterkit.tools.combine import Share, combine
from adapterkit.tools.effects import effects
from adapterkit.tools.points import points_of
from adapterkit.tools.ranks import RankRule
from tests.tools import adapters

ONE = ak.LoRA(rank=2, alpha=3, targets="attn.q attn.v mlp.up")
OTHER = ak.LoRA(rank=3, alphas={"conv": 1.0}, targets="mlp.up conv")


def both() -> tuple[Checkpoint, Checkpoint]:
    return adapters.checkpoint(ONE), adapters.checkpoint(OTHER, seed=1)


def weighted(*pairs: tuple[Checkpoint, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for checkpoint, weight in pairs:
        for name, change in adapters.changes(checkpoint, toys.ToyModel(), weight).items():
            total[name] = total.get(name, torch.zeros(())) + change
    return total


def assert_equal(found: Checkpoint, expected: dict[str, Tensor]) -> None:
    changes = adapters.changes(found, toys.ToyModel())
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, expected[name], atol=2e-6, rtol=1e-5)


def test_a_sum_is_exact_and_its_ranks_are_sums():
    one, other = both()
    found = combine([Share(one, 0.7), Share(other, -1.5)])
    assert found.error == 0
    assert_equal(found.checkpoint, weighted((one, 0.7), (other, -1.5)))
    ranks = {key: done.rank for key, done in found.points.items()}
    assert ranks["mlp.up@toy.0"] == 5
    assert ranks["attn.q@toy.1"] == 2
    assert ranks["conv@toy.0"] == 3


def test_a_sum_of_fewer_ranks_is_the_best_there_is():
    one, other = both()
    exact = weighted((one, 1.0), (other, 1.0))
    found = combine([Share(one), Share(other)], rule=RankRule(rank=2))
    changes = adapters.changes(found.checkpoint, toys.ToyModel())
    left = adapters.norm(adapters.less(exact, changes)) / adapters.norm(exact)
    assert left == pytest.approx(found.error, rel=1e-4)
    tail = float(torch.linalg.svdvals(exact["blocks.0.up.weight"])[2:].norm())
    assert found.points["mlp.up@toy.0"].error == pytest.approx(tail, rel=1e-4)


def test_across_types_with_biases():
    one = adapters.checkpoint(ak.Union((ONE, ak.Trainable("mlp.up conv", part="bias"))))
    other = adapters.checkpoint(LoHa(rank=2, targets="mlp.up mlp.down"), seed=2)
    with pytest.raises(ConfigError, match="say what to keep"):
        combine([Share(one), Share(other)])
    found = combine([Share(one, 0.5), Share(other, 2.0)], rule=RankRule(rank=8))
    assert found.error < 1e-6
    assert_equal(found.checkpoint, weighted((one, 0.5), (other, 2.0)))
    assert {part.type for part in found.checkpoint.parts} == {"lora", "trainable", "union"}


def test_what_adds_nothing_to_a_weight_has_no_part_in_a_merge_of_weights():
    shift = adapters.checkpoint(ak.Trainable("mlp.up", part="bias"))
    loha = adapters.checkpoint(LoHa(rank=2, targets="mlp.up"), seed=2)
    found = combine([Share(shift, 3.0), Share(loha, 0.5)], rule=RankRule(rank=8))
    assert_equal(found.checkpoint, weighted((shift, 3.0), (loha, 0.5)))


def test_a_bias_alone_stays_one_alone():
    one = adapters.checkpoint(ak.Trainable("mlp.up conv", part="bias"))
    found = combine([Share(one, 0.5), Share(one, 0.25)])
    assert_equal(found.checkpoint, weighted((one, 0.75)))


def test_what_depends_on_the_weight_is_weighted_as_it_acts():
    one = adapters.checkpoint(ak.DoRA(rank=2, targets="mlp.up"))
    norms = adapters.checkpoint(ak.Trainable("norm mlp.up"), seed=3)
    shares = [Share(one, 0.5), Share(norms, 0.5)]
    with pytest.raises(BaseNeededError):
        combine(shares, rule=RankRule(rank=8))
    found = combine(shares, rule=RankRule(rank=8), points=points_of(toys.ToyModel()))
    assert_equal(found.checkpoint, weighted((one, 0.5), (norms, 0.5)))


def test_factors_by_block():
    one, other = both()
    blocks = {"mlp.*": 0.5, "*@layer>=1": 2.0}
    found = combine([Share(one, 0.5, blocks), Share(other)], points=points_of(toys.ToyModel()))
    change, whole = (adapters.changes(each, toys.ToyModel()) for each in (found.checkpoint, one))
    torch.testing.assert_close(change["blocks.0.attn.qkv.weight"], 0.5 * whole["blocks.0.attn.qkv.weight"])
    torch.testing.assert_close(change["blocks.1.attn.qkv.weight"], whole["blocks.1.attn.qkv.weight"])
    expected = weighted((one, 0.25), (other, 1.0))["blocks.0.up.weight"]
    torch.testing.assert_close(change["blocks.0.up.weight"], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(BaseNeededError, match="layer"):
        combine([Share(one, 0.5, blocks)])
    with pytest.raises(ConfigError, match=r"'mlp.down' matches none of its points"):
        combine([Share(one, 0.5, {"mlp.down": 0.0})])


# -- merges of dense updates ------------------------------------------------------------------------------------------


def dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {effect.point.id: effect.dense for effect in effects(checkpoint)}


def test_ties_is_the_mean_of_those_that_agree():
    a = torch.tensor([[1.0, -2.0, 0.1], [3.0, 0.2, -4.0]])
    b = torch.tensor([[-3.0, -1.0, 0.2], [2.0, 5.0, 0.1]])
    found = sparse.merged("ties", [a, b], [1.0, 1.0], 0.5, "")
    # Each keeps three: [-2, 3, -4] of a, [-3, 2, 5] of b; in each place the sign of the sum counts.
    assert torch.equal(found, torch.tensor([[-3.0, -2.0, 0.0], [2.5, 5.0, -4.0]]))
    opposed = sparse.merged("ties", [torch.tensor([[2.0]]), torch.tensor([[-3.0]])], [1.0, 0.5], 1.0, "")
    assert torch.equal(opposed, torch.tensor([[2.0]]))


@pytest.mark.parametrize("method", sparse.METHODS)
def test_a_merge_is_that_of_the_dense_updates_at_every_point(method: str):
    one, other = both()
    found = combine([Share(one, 0.7), Share(other)], method, density=0.4, seed=5, rule=RankRule(rank=16))
    assert found.error < 1e-5
    updates, result = (dense(one), dense(other)), dense(found.checkpoint)
    for key, change in result.items():
        own = [(d[key], w) for d, w in zip(updates, (0.7, 1.0), strict=True) if key in d]
        expected = sparse.merged(method, [d for d, _ in own], [w for _, w in own], 0.4, f"5/{key}")
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


def test_what_is_drawn_depends_on_the_seed_alone():
    one, other = both()
    first, again, another = (
        dense(combine([Share(one), Share(other)], "dare", seed=seed, rule=RankRule(rank=16)).checkpoint)
        for seed in (0, 0, 1)
    )
    for key in first:
        assert torch.equal(first[key], again[key])
        assert not torch.allclose(first[key], another[key])


def test_dare_keeps_the_expectation():
    update = torch.ones(200, 200)
    found = sparse.merged("dare", [update], [1.0], 0.25, "seed")
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)


def test_magnitude_keeps_exactly_so_many():
    update = torch.ones(10, 10)
    assert int(sparse.merged("magnitude", [update], [1.0], 0.3, "").count_nonzero()) == 30


def test_a_merge_without_a_rule_has_the_sum_of_the_ranks_and_tells_its_error():
    one, other = both()
    found = combine([Share(one), Share(other)], "ties")
    assert found.points["mlp.up@toy.0"].rank == 5
    assert found.error > 0


# -- what does not go together ----------------------------------------------------------------------------------------


def test_adapters_for_different_models_are_refused():
    one, _ = both()
    other = adapters.checkpoint(ONE, toys.ToyModel(layers=3))
    with pytest.raises(BaseMismatchError, match=r"different models \(toy: attn.q 2 and 3"):
        combine([Share(one), Share(other)])
    foreign = adapters.checkpoint(ak.LoRA(rank=2, targets="res.conv1"), models.EXAMPLES[2].make())
    assert {*combine([Share(one), Share(foreign)]).checkpoint.base} == {"toy", "unet"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"density": 0.0}, "density must be more than 0"),
    ],
)
def test_strange_options_are_refused(options: dict[str, object], problem: str):
    with pytest.raises(ConfigError, match=problem):
        combine([Share(both()[0])], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a weight must be a number, not nan"):
        combine([Share(both()[0], float("nan"))])
    with pytest.raises(ConfigError, match="at least one"):
        combine([])


def test_what_changes_no_weight_cannot_be_combined():
    with pytest.raises(NotMergeableError):
        combine([Share(adapters.checkpoint(ak.Bottleneck(width=2, targets="mlp")))])


def test_it_says_what_it_was_made_from_and_what_all_of_them_say():
    one, other = (each.replace(metadata={"trigger": "ink", "own": str(n)}) for n, each in enumerate(both()))
    found = combine([Share(one, 0.5, name="a.safetensors"), Share(other, name="b.safetensors")])
    assert found.checkpoint.metadata == {
        "trigger": "ink",
        "modelspec.merged_from": "sum of a.safetensors x 0.5, b.safetensors x 1",
    }
    assert found.checkpoint.base["toy"]["roles"] == {"attn.q": 2, "attn.v": 2, "conv": 2, "mlp.up": 2}


def test_factors_of_roles_that_only_the_model_tells():
    one, _ = both()
    with pytest.raises(ConfigError, match=r"'nothing' matches none of its points, whose roles the model tells: --base"):
        combine([Share(one, blocks={"nothing": 0.5})])
