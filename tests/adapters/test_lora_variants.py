"""LoRA's starts, scales and dropouts, DoRA and AdaLoRA: each against its equation, on a whole model of every layout."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import toys
from tests.adapters.recorder import recorded
from tests.values import randomize

X = toys.ids()


@pytest.fixture
def model() -> toys.ToyModel:
    toys.register()
    return toys.ToyModel().double().eval()


@pytest.fixture
def adapters(model: toys.ToyModel) -> ak.Adapters:
    return ak.Adapters(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "adapterkit" not in key}


# -- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora", "eva"])
def test_every_start_has_no_effect_and_leaves_the_base_alone(
    model: toys.ToyModel, adapters: ak.Adapters, init: str
) -> None:
    before, base = weights(model), model(X)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.* mlp.* conv", init=init))
    assert torch.equal(model(X), base)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(model).items())
    with adapters.merged():
        assert torch.equal(model(X), base) if init in ("pissa", "olora") else close(model(X), base)
    model(X).square().mean().backward()
    grads = [p.grad.abs().sum() for p in adapters.parameters("a")]  # type: ignore[union-attr]
    both = init in ("pissa", "olora")
    assert all(grad > 0 for grad in grads) if both else sum(float(grad > 0) for grad in grads) == len(grads) / 2


@pytest.mark.parametrize("rank", [2, 8])
def test_the_gaussian_start_has_the_deviation_of_one_over_the_rank(rank: int) -> None:
    """PEFT's `init_lora_weights="gaussian"`."""
    adapters = ak.Adapters(nn.Sequential(nn.Linear(4096, 4)))
    adapters.add("a", ak.LoRA(rank=rank, targets="*", init="gaussian"))
    [module] = adapters.modules("a").values()
    a: Any = module.A
    assert abs(a.std() * rank - 1) < 0.05
    assert abs(a.mean() * rank) < 0.05
    assert 0.66 < (a.abs() < 1 / rank).double().mean() < 0.71, "of a normal distribution 68 % lie within one deviation"


def test_pissa_starts_from_the_principal_part(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=3, alpha=6, targets="mlp.up conv", init="pissa"))
    for key, module in adapters.modules("a").items():
        layer = model.blocks[int(key[-1])].get_submodule("conv" if key.startswith("conv") else "up")
        weight = layer.weight.detach().flatten(1)  # type: ignore[operator,union-attr]
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        principal = (u[:, :3] * s[:3]) @ vh[:3]
        assert close(2 * module.B @ module.A.flatten(1), principal)  # type: ignore[operator,union-attr]
        sizes = (module.A.flatten(1).norm(dim=1), module.B.norm(dim=0))  # type: ignore[operator,union-attr]
        assert close(*sizes)


def test_olora_starts_from_orthonormal_columns(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=3, targets="mlp.up", init="olora"))
    module = adapters.modules("a")["mlp.up@toy.0"]
    q, r = torch.linalg.qr(model.blocks[0].up.weight.detach())  # type: ignore[union-attr,operator]
    assert close(module.B, q[:, :3])  # type: ignore[arg-type]
    assert close(module.A, r[:3])  # type: ignore[arg-type]


def test_a_start_from_the_base_is_saved_and_trained(
    model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path
) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets="attn.* conv embed.tokens", init="pissa"))
    randomize(adapters, "a")
    y = model(X)
    for key, module in adapters.modules("a").items():
        product = module.B @ module.A.flatten(1) - module.B0 @ module.A0.flatten(1)  # type: ignore[operator,union-attr]
        assert close(module.delta_weight().flatten(1), product), key  # type: ignore[operator,union-attr]
    with adapters.merged():
        assert close(model(X), y)
    path = adapters.save("a", tmp_path / "a.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("a")
    assert torch.equal(model(X), y)


def test_a_rank_that_the_weight_does_not_have_is_refused(adapters: ak.Adapters) -> None:
    with pytest.raises(errors.IncompatibleTargetError, match="takes its rank from the weight, which has 8"):
        adapters.add("a", ak.LoRA(rank=9, targets="attn.q", init="pissa"))


def test_eva_takes_the_principal_directions_of_the_inputs(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up conv", init="eva"))
    inputs: dict[str, list[Tensor]] = {"up": [], "conv": []}
    block = model.blocks[1]
    for name, found in inputs.items():
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, found=found: found.append(args[0].detach())
        )
    with adapters.observing("a"):
        for seed in range(3):
            model(toys.ids(seed=seed))
    rows = torch.cat([x.flatten(0, 1) for x in inputs["up"]])
    patches = [nn.functional.pad(x, (1, 1)).unfold(2, 3, 1) for x in inputs["conv"]]  # [batch, channels, length, 3]
    grouped = torch.cat([p.unflatten(1, (2, -1)).permute(0, 1, 3, 2, 4).flatten(0, 2).flatten(1) for p in patches])
    for key, seen in (("mlp.up@toy.1", rows), ("conv@toy.1", grouped)):
        module = adapters.modules("a")[key]
        a = module.A.detach().flatten(1)  # type: ignore[operator,union-attr]
        directions = torch.linalg.svd(seen, full_matrices=False).Vh[:2]
        assert close(a @ a.mT, torch.eye(2, dtype=a.dtype)), key
        # Directions are found up to sign, and up to what truncating between batches lost.
        assert torch.allclose((a * directions).sum(1).abs(), torch.ones(2, dtype=a.dtype), atol=1e-2), key
    assert torch.equal(model(X), disabled(model, adapters))


def disabled(model: nn.Module, adapters: ak.Adapters) -> Tensor:
    with adapters.disabled():
        return model(X)


def test_eva_says_when_it_has_seen_too_little(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=8, targets="mlp.down", init="eva"))
    with pytest.raises(errors.ConfigError, match="the inputs had 2 directions, and rank is 8"), adapters.observing("a"):
        model(toys.ids(batch=1, length=2))
    with pytest.raises(errors.IncompatibleTargetError, match="input with features"):
        adapters.add("b", ak.LoRA(rank=2, targets="embed.tokens", init="eva"))


# -- scales and rates -----------------------------------------------------------------------------------------------


def test_scales(adapters: ak.Adapters) -> None:
    config = ak.LoRA(rank=4, alpha=8, targets="attn.* mlp.*", ranks={"mlp.*": 16}, alphas={"attn.v": 2, "*@layer=1": 6})
    adapters.add("a", config)
    stable = dataclasses.replace(config, scaling="rank_stabilized")
    adapters.add("s", stable)
    expected = {"attn.q@toy.0": (8, 4), "attn.v@toy.0": (2, 4), "mlp.up@toy.0": (8, 16), "mlp.up@toy.1": (6, 16)}
    for key, (alpha, rank) in expected.items():
        assert adapters.modules("a")[key].scale == alpha / rank
        assert adapters.modules("s")[key].scale == alpha / rank**0.5
        assert adapters.modules("a")[key].A.shape[0] == rank
    assert ak.LoRA.from_dict(stable.to_dict()) == stable
    with pytest.raises(errors.ConfigError, match=r"alphas: 'cross\.\*' match none"):
        adapters.add("b", ak.LoRA(targets="attn.q", alphas={"cross.*": 1}))


def test_a_config_of_an_older_file_still_loads() -> None:
    old = {"targets": "attn.q", "rank": 4, "alpha": 8, "dropout": 0.1, "ranks": [["attn.q", 2]]}
    assert ak.LoRA.from_dict(old) == ak.LoRA(targets="attn.q", rank=4, alpha=8, dropout=0.1, ranks={"attn.q": 2})


def test_lora_plus(adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(targets="attn.q", plus=16))
    groups = {group["lr"]: group["params"] for group in adapters.parameter_groups("a", lr=1e-3)}
    assert groups.keys() == {1e-3, 16e-3}
    modules = adapters.modules("a").values()
    assert {id(p) for p in groups[16e-3]} == {id(m.B) for m in modules}
    assert {id(p) for p in groups[1e-3]} == {id(m.A) for m in modules}


# -- dropouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank_dropout", "module_dropout"])
def test_dropouts_act_in_training_only(model: toys.ToyModel, adapters: ak.Adapters, kind: str) -> None:
    adapters.add("a", ak.LoRA(rank=4, targets="attn.* conv embed.tokens", **{kind: 0.5}))  # type: ignore[arg-type]
    randomize(adapters, "a")
    eval_output = model(X)
    with adapters.merged():
        assert close(model(X), eval_output)
    model.train()
    assert not close(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), eval_output)


def test_rank_dropout_drops_ranks_of_a_sample() -> None:
    toys.register()
    model = toys.ToyModel().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=4, targets="mlp.up", rank_dropout=0.5))
    module = adapters.modules("a")["mlp.up@toy.0"].train()
    module.B.data = torch.eye(16, 4, dtype=torch.float64)  # type: ignore[union-attr]
    x = torch.ones(6, 5, 8, dtype=torch.float64)
    y, full = module.delta(x)[..., :4], x @ module.A.mT  # type: ignore[operator,union-attr]
    kept = y != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # the same for every token of a sample
    assert close(y[kept], 2 * full[kept])  # what is kept is scaled up
    assert 0 < kept.double().mean() < 1


def test_module_dropout_drops_all_or_nothing() -> None:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel().double())
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up", module_dropout=0.5))
    randomize(adapters, "a")
    module = adapters.modules("a")["mlp.up@toy.0"].train()
    x = torch.ones(2, 3, 8, dtype=torch.float64)
    full = module.eval().delta(x)  # type: ignore[operator]
    outputs = [module.train().delta(x) for _ in range(40)]  # type: ignore[operator]
    dropped = [bool((y == 0).all()) for y in outputs]
    assert all(d or torch.equal(y, full) for d, y in zip(dropped, outputs, strict=True))
    assert 5 < sum(dropped) < 35


# -- DoRA -----------------------------------------------------------------------------------------------------------


def test_dora_is_its_equation_and_merges(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    base = model(X)
    adapters.add("d", ak.DoRA(rank=3, alpha=5, targets="attn.* mlp.* conv head"))
    assert close(model(X), base)
    randomize(adapters, "d")
    y = model(X)
    with adapters.merged():
        assert close(model(X), y)
    block = model.blocks[0]
    for key, layer in (("mlp.up@toy.0", block.up), ("conv@toy.0", block.conv)):  # type: ignore[union-attr]
        module = adapters.modules("d")[key]
        updated = layer.weight + 5 / 3 * (module.B @ module.A.flatten(1)).view_as(layer.weight)  # type: ignore
        norms = updated.flatten(1).norm(dim=1)
        shape = (-1, *(1,) * (updated.ndim - 1))
        merged, bias = module.merged(layer.weight, layer.bias)  # type: ignore[operator,union-attr]
        assert close(merged, updated * (module.magnitude / norms).view(shape))  # type: ignore[operator,arg-type]
        assert bias is layer.bias


def test_dora_gradients_hold_the_norm_constant(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("d", ak.DoRA(rank=2, targets="mlp.up@layer=0"))
    randomize(adapters, "d")
    module, layer = adapters.modules("d")["mlp.up@toy.0"], model.blocks[0].up
    x = torch.randn(4, 8, dtype=torch.float64)
    layer(x).square().sum().backward()  # type: ignore[operator]
    a, b, m = (getattr(module, n).detach().clone().requires_grad_() for n in ("A", "B", "magnitude"))
    updated = layer.weight + b @ a  # type: ignore[operator,union-attr]
    norms = updated.norm(dim=1).detach()
    (x @ (updated * (m / norms)[:, None]).mT + layer.bias).square().sum().backward()  # type: ignore[operator]
    for name, expected in (("A", a), ("B", b), ("magnitude", m)):
        assert close(getattr(module, name).grad, expected.grad)


def test_dora_from_a_file_needs_no_start(model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path) -> None:
    adapters.add("d", ak.DoRA(rank=2, targets="attn.q conv", init="pissa"))
    randomize(adapters, "d")
    y = model(X)
    path = adapters.save("d", tmp_path / "d.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("d")
    assert torch.equal(model(X), y)


def test_dora_scales_the_features_of_an_embedding(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    [point] = [point for point in adapters.points() if point.role == "embed.tokens"]
    table = model.get_submodule(point.path).weight.detach()
    adapters.add("d", ak.DoRA(targets="embed.tokens", rank=2))
    randomize(adapters, "d")
    [module] = adapters.modules("d").values()
    moved = table.mT + module.scale * module.B @ module.A  # type: ignore[operator]
    wanted = (module.magnitude / moved.norm(dim=1))[:, None] * moved  # type: ignore[operator]
    adapters.activate("d")
    with torch.no_grad():
        assert torch.allclose(model.get_submodule(point.path)(X), wanted.mT[X], atol=1e-6)


def test_dora_never_forms_the_dense_product() -> None:
    layer = nn.Linear(512, 1024, bias=False)
    wide = ak.Adapters(nn.Sequential(layer))
    wide.add("d", ak.DoRA(rank=2, targets="*"))
    [module] = wide.modules("d").values()
    with recorded() as seen:
        module.norms(layer.weight.detach())  # type: ignore[operator]
    large = [count for _, count in seen if count > 2 * (512 + 1024)]
    assert large in ([], [layer.weight.numel()])  # at most a view of the weight itself


# -- AdaLoRA --------------------------------------------------------------------------------------------------------


def ranks(adapters: ak.Adapters) -> dict[str, int]:
    return {key: int((module.E != 0).sum()) for key, module in adapters.modules("ada").items()}  # type: ignore


def test_adalora_is_its_equation(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    base = model(X)
    adapters.add("ada", ak.AdaLoRA(rank=2, initial=4, alpha=8, targets="attn.* conv embed.tokens"))
    assert torch.equal(model(X), base)
    randomize(adapters, "ada")
    y = model(X)
    for module in adapters.modules("ada").values():
        product = 2.0 * module.P @ torch.diag(module.E) @ module.Q.flatten(1)  # type: ignore[operator,union-attr,arg-type]
        assert close(module.delta_weight().flatten(1), product)  # type: ignore[operator,union-attr]
    with adapters.merged():
        assert close(model(X), y)
    q = adapters.modules("ada")["attn.q@toy.0"]
    eye = torch.eye(4, dtype=torch.float64)
    points = len(adapters.modules("ada"))
    expected = 0.25 / points * ((q.P.mT @ q.P - eye).norm() + (q.Q @ q.Q.mT - eye).norm())  # type: ignore[operator,union-attr]
    assert close(q.penalty(), expected)  # type: ignore[operator,arg-type]


def test_adalora_hands_its_ranks_out(model: toys.ToyModel, adapters: ak.Adapters, tmp_path: Path) -> None:
    config = ak.AdaLoRA(rank=2, initial=4, warmup=2, final=4, targets="attn.q mlp.*", beta1=0.5, beta2=0.5)
    adapters.add("ada", config)
    points, steps = len(adapters.modules("ada")), 16
    optimizer = torch.optim.Adam(adapters.parameter_groups("ada", lr=0.02))
    budgets = []
    for step in range(1, steps + 1):
        logits = model(X)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), X.roll(1, 1).flatten()) + adapters.penalty()
        loss.backward()
        optimizer.step()
        adapters.after_step(step, steps)
        optimizer.zero_grad()
        budgets.append(sum(ranks(adapters).values()))
    assert budgets[0] == 4 * points
    assert budgets[-1] == 2 * points
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))
    assert budgets[-4:] == [2 * points] * 4
    assert len(set(ranks(adapters).values())) > 1  # not everywhere the same
    y = model(X)
    path = adapters.save("ada", tmp_path / "ada.safetensors")
    adapters.detach()
    adapters.load(path)
    adapters.activate("ada")
    assert torch.equal(model(X), y)


def test_adalora_keeps_what_matters() -> None:
    toys.register()
    adapters = ak.Adapters(toys.ToyModel().double())
    adapters.add("ada", ak.AdaLoRA(rank=1, initial=2, targets="attn.{q,v}@layer=0"))
    modules = adapters.modules("ada")
    for key, module in modules.items():
        for name, parameter in module.named_parameters():
            parameter.data.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
            if name == "E":
                parameter.grad = torch.tensor([1.0, 3.0] if key.startswith("attn.q") else [2.0, 0.5]).double()
    adapters.after_step(1, 1)
    assert [module.E.tolist() for module in modules.values()] == [[0.0, 1.0], [1.0, 0.0]]  # type: ignore


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"scaling": "rs"}, "scaling must be one of"),
        ({"rank_dropout": 1.0}, "rank_dropout must be at least 0"),
        ({"plus": 0}, "plus must be more than 0"),
        ({"alphas": {"attn.q": "x"}}, r"alphas\['attn.q'\] must be a number"),
        ({"alphas": 3}, "alphas must map selectors"),
        ({"alphas": {"attn.q": 1e9}}, "must be within"),
        ({"alpha": -1, "init": "pissa"}, "must be positive"),
    ],
)
def test_wrong_values(config: dict[str, object], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        ak.LoRA(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config", [{"rank": 0}, {"initial": 2}, {"interval": 0}, {"beta1": 1.0}, {"orthogonality": -1.0}, {"alpha": 1e9}]
)
def test_wrong_values_of_adalora(config: dict[str, float]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(config))):
        ak.AdaLoRA(**config)  # type: ignore[arg-type]


# -- found by a review ----------------------------------------------------------------------------------------------


def test_small_changes_of_doras_magnitude_are_seen_in_half_precision() -> None:
    toys.register()
    model = toys.ToyModel().bfloat16().eval()
    adapters = ak.Adapters(model)
    adapters.add("d", ak.DoRA(targets="mlp.up"))
    module = adapters.modules("d")["mlp.up@toy.0"]
    module.magnitude.data *= 1.003  # type: ignore[union-attr,operator]
    x = torch.randn(4096, 8).bfloat16()
    layer = model.blocks[0].up
    with adapters.disabled():
        exact = x.double() @ layer.weight.double().mT * 0.003  # type: ignore[union-attr,operator]
        change = module(x, _Base(layer)).double() - layer(x).double()  # type: ignore[operator]
        seen = (change * exact).sum() / exact.square().sum()
    assert 0.7 < seen < 1.3  # the output's own rounding is as large, but it is not correlated


class _Base:
    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.weight, self.bias = layer, layer.weight.detach(), layer.bias.detach()  # type: ignore

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_dropped_rank_is_dropped_with_its_start() -> None:
    toys.register()
    model = toys.ToyModel().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up conv", init="pissa", rank_dropout=0.5))
    randomize(adapters, "a")
    for key, x in (("mlp.up@toy.0", torch.randn(1, 1, 8).double()), ("conv@toy.0", torch.randn(1, 8, 4).double())):
        module = adapters.modules("a")[key].train()
        outputs = []
        for kept in ((0, 0), (1, 0), (0, 1), (1, 1)):
            keep = torch.tensor(kept, dtype=torch.float64)
            product = module.product()  # type: ignore[operator]
            a, b = product.A, product.B
            twice = torch.cat([keep, keep]) * 2
            whole = ak.LoRA(rank=4, targets="mlp.up conv").build({p.id: p for p in adapters.points()}[key]).double()
            whole.A.data, whole.B.data = a.detach(), (b * twice).detach()  # type: ignore[union-attr]
            outputs.append(whole.eval().delta(x))  # type: ignore[operator]
        for _ in range(20):
            y = module.delta(x)  # type: ignore[operator]
            assert any(torch.allclose(y, one, atol=1e-9) for one in outputs), key


def test_observing_a_trained_adapter_is_refused(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up", init="eva"))
    randomize(adapters, "a")
    before = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    with pytest.raises(errors.ConfigError, match="observe before training"), adapters.observing("a"):
        model(X)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.state_dict("a").items())


def test_a_block_that_raises_leaves_nothing_behind(model: toys.ToyModel, adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=2, targets="mlp.up", init="eva"))
    with pytest.raises(IndexError), adapters.observing("a"):
        model(X + toys.VOCABULARY * (torch.arange(5) == 4))  # the embedding has no such row
    assert all(module._seen is None for module in adapters.modules("a").values())


def test_an_update_across_groups_is_that_of_a_convolution_without_groups(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)).double()
    handle, x = ak.Adapters(net), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    base = net(x)
    handle.add("a", ak.LoRA(targets="*", rank=3, alpha=6.0, across_groups=True))
    assert torch.equal(net(x), base)
    randomize(handle, "a")
    [module] = handle.modules("a").values()
    weight = torch.einsum("or,rikl->oikl", module.B, module.A) * 2  # type: ignore[arg-type]
    handle.activate("a")
    torch.testing.assert_close(net(x), base + nn.functional.conv2d(x, weight, padding=1))
    with pytest.raises(errors.NotMergeableError):
        handle.merge("a")
    path, y = handle.save("a", tmp_path / "a.safetensors"), net(x)
    handle.detach()
    handle.load(path)
    handle.activate("a")
    assert torch.equal(net(x), y)
    with pytest.raises(errors.IncompatibleTargetError, match="across_groups"):
        handle.add("b", ak.DoRA(targets="*", across_groups=True))
