"""The handle: what acts, what trains, and that nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.backend import SITE
from adapterkit.testing import toys
from tests.values import randomize

CONFIGS = {
    "lora": ak.LoRA(rank=2, targets="*"),
    "spans": ak.LoRA(rank=2, targets="attn.q attn.v"),
    "bottleneck": ak.Bottleneck(targets="attn mlp", activation="gelu", reduction=2),
    "prefix": ak.Prefix(length=3),
}


@pytest.fixture(autouse=True)
def _toys() -> None:
    toys.register()


@pytest.fixture
def model() -> toys.ToyModel:
    return toys.ToyModel().double().eval()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that attaching could disturb."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "weights": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "dicts": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [
            (dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._forward_pre_hooks_with_kwargs))
            for module in model.modules()
        ],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for part, value in before.items():
        if part != "weights":
            assert after[part] == value, part
    assert before["weights"].keys() == after["weights"].keys()  # type: ignore[union-attr]
    for name, (identity, grad, tensor) in before["weights"].items():  # type: ignore[union-attr]
        identity2, grad2, tensor2 = after["weights"][name]  # type: ignore[index]
        assert (identity, grad) == (identity2, grad2), name
        assert torch.equal(tensor, tensor2), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_detach_gives_back_the_very_model(model: toys.ToyModel, config: ak.AdapterConfig) -> None:
    model.blocks[0].train()
    model.blocks[1].get_parameter("norm1.weight").requires_grad_(False)
    x, before = toys.ids(), snapshot(model)
    y, rng = model(x), torch.get_rng_state()
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    adapters.add("b", config)
    randomize(adapters, "a")
    adapters.activate(["a", "b"])
    assert not torch.equal(model(x), y)
    adapters.detach()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), y)
    assert len(adapters) == 0


@pytest.mark.parametrize("name", ["lora", "spans", "bottleneck"])
def test_zero_effect_at_initialisation_is_bitwise(model: toys.ToyModel, name: str) -> None:
    x = toys.ids()
    y = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS[name])
    assert torch.equal(model(x), y)
    adapters.activate({"a": 0.5})
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_the_adapter_trains_and_all_of_it(model: toys.ToyModel, config: ak.AdapterConfig) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    mine = {id(p) for p in adapters.parameters("a")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    model(toys.ids()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters("a"))
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)


def test_adding_trains_the_new_one_alone_and_freeze_stops_it(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS["lora"])
    adapters.add("b", CONFIGS["prefix"])
    assert not any(p.requires_grad for p in adapters.parameters("a"))
    assert all(p.requires_grad for p in adapters.parameters("b"))
    adapters.train("a", "b")
    assert all(p.requires_grad for p in adapters.parameters())
    adapters.freeze("a")
    assert not any(p.requires_grad for p in adapters.parameters("a"))
    assert all(p.requires_grad for p in adapters.parameters("b"))
    with adapters.disabled():
        assert all(p.requires_grad for p in adapters.parameters("b"))
    assert not any(p.requires_grad for p in adapters.parameters("a"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_interpolate_the_effect(model: toys.ToyModel, config: ak.AdapterConfig) -> None:
    x = toys.ids()
    base = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    full = model(x)
    adapters.activate({"a": 0.0})
    assert torch.equal(model(x), base)
    adapters.activate({"a": 1})
    assert torch.equal(model(x), full)
    adapters.activate({"a": 1e-9})
    assert torch.allclose(model(x), base, atol=1e-6)
    assert adapters.active == {"a": 1e-9}


def test_sum_of_two_equals_one_of_concatenated_rank(model: toys.ToyModel) -> None:
    x = toys.ids()
    adapters = ak.Adapters(model)
    for i, name in enumerate("ab"):
        adapters.add(name, ak.LoRA(rank=2, targets="all"))
        randomize(adapters, name, seed=i)
    adapters.add("both", ak.LoRA(rank=4, targets="all"))
    a, b, both = (adapters.state_dict(name) for name in ("a", "b", "both"))
    with torch.no_grad():
        for key in both:
            if key.endswith("/A"):
                both[key].copy_(torch.cat([a[key], b[key]], dim=0))
            else:
                both[key].copy_(torch.cat([0.5 * a[key], -2.0 * b[key]], dim=1))
    together = model(x)
    adapters.activate({"a": 0.5, "b": -2.0})
    assert torch.allclose(model(x), together, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lora", "spans"])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.3}, {"a": 0.7, "b": -1.5}])
def test_merged_equals_unmerged_and_unmerge_is_bitwise(
    model: toys.ToyModel, name: str, weights: dict[str, float]
) -> None:
    x = toys.ids()
    base, before = model(x), snapshot(model)
    adapters = ak.Adapters(model)
    for i, adapter in enumerate(weights):
        adapters.add(adapter, CONFIGS[name])
        randomize(adapters, adapter, seed=i)
    adapters.activate(weights)  # pyright: ignore[reportArgumentType]
    y = model(x)
    with adapters.merged():
        assert torch.allclose(model(x), y, rtol=1e-10, atol=1e-10)
        assert adapters.active == weights
    assert torch.equal(model(x), y)
    adapters.merge()
    adapters.detach()
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), base)


def test_a_tied_weight_is_untied_for_the_merge(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="head"))
    randomize(adapters, "a")
    y = model(toys.ids())
    tied = model.embed.weight
    with adapters.merged():
        assert model.embed.weight is tied
        assert torch.allclose(model(toys.ids()), y, rtol=1e-10, atol=1e-10)
    assert model.head.weight is model.embed.weight


def test_what_would_corrupt_a_merge_is_refused(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS["lora"])
    adapters.add("b", CONFIGS["lora"])
    randomize(adapters, "a")
    x, y = toys.ids(), None
    adapters.activate("a")
    y = model(x)
    adapters.merge()
    merged = model(x)
    for refused in (
        lambda: adapters.merge("b"),
        lambda: adapters.activate("b"),
        lambda: adapters.activate({"a": 0.5}),
        lambda: adapters.remove("a"),
        lambda: adapters.add("c", CONFIGS["lora"]),
        lambda: adapters.disabled().__enter__(),
    ):
        with pytest.raises(errors.StateError, match="merge"):
            refused()
    assert torch.equal(model(x), merged)
    adapters.remove("b")
    assert list(adapters) == ["a"]
    adapters.unmerge()
    assert torch.equal(model(x), y)
    with pytest.raises(errors.StateError, match="nothing is merged"):
        adapters.unmerge()


def test_a_merge_that_cannot_be_leaves_everything(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("good", CONFIGS["lora"])
    randomize(adapters, "good")
    adapters.add("kv", CONFIGS["prefix"])
    before = snapshot(model)
    with pytest.raises(errors.NotMergeableError, match=r"attn\.kv@toy\.0"):
        adapters.merge(["good", "kv"])
    assert_same(before, snapshot(model))
    with torch.no_grad():
        for parameter in adapters.parameters("good"):
            parameter.fill_(1e200)
    before = snapshot(model)
    with pytest.raises(errors.NotMergeableError, match="NaN or infinity"):
        adapters.merge("good")
    assert_same(before, snapshot(model))


def test_moving_while_merged_keeps_the_unmerge_exact() -> None:
    model = toys.ToyModel().eval()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="all"))
    randomize(adapters, "a")
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "adapterkit" not in name}
    adapters.merge()
    model.bfloat16()
    adapters.unmerge()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_contexts_nest_and_are_restored_when_the_body_raises(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS["lora"])
    adapters.add("b", CONFIGS["lora"])
    adapters.activate("a")

    def body() -> None:
        with adapters.activated({"b": 2.0}):
            assert adapters.active == {"b": 2.0}
            with adapters.disabled():
                assert adapters.active == {}
            assert adapters.active == {"b": 2.0}
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        body()
    assert adapters.active == {"a": 1.0}


def test_two_threads_see_their_own_adapters(model: toys.ToyModel) -> None:
    x = toys.ids()
    adapters = ak.Adapters(model)
    expected = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config)
        randomize(adapters, name, seed=i)
        expected[name] = model(x)
    wrong: list[str] = []
    barrier = threading.Barrier(len(CONFIGS))

    def serve(name: str) -> None:
        barrier.wait()
        for _ in range(40):
            with torch.no_grad(), adapters.activated(name):
                if not torch.equal(model(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in CONFIGS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_copies_are_independent(model: toys.ToyModel, config: ak.AdapterConfig) -> None:
    x = toys.ids()
    base = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    y = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(x), y)
        other = ak.Adapters(twin)
        assert list(other) == ["a"]
        with torch.no_grad():
            for parameter in other.parameters("a"):
                parameter.add_(1.0)
        assert torch.equal(model(x), y)
        other.detach()
        assert torch.equal(twin(x), base)
        assert SITE in next(m for m in model.modules() if SITE in m.__dict__).__dict__
    assert torch.equal(model(x), y)


def test_a_second_handle_shares_the_state(model: toys.ToyModel) -> None:
    first, second = ak.Adapters(model), ak.Adapters(model)
    first.add("a", CONFIGS["lora"])
    assert "a" in second
    assert len(second) == 1
    second.remove("a")
    assert "a" not in first
    first.add("b", CONFIGS["lora"])
    assert list(second) == ["b"]


def test_a_pipeline_is_one_model_with_components() -> None:
    @dataclasses.dataclass
    class Pipeline:
        unet: nn.Module
        text_encoder: nn.Module
        vae: nn.Module
        tokenizer: object = None

        @property
        def components(self) -> dict[str, object]:
            return {**dataclasses.asdict(self), "unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae}

    pipe = Pipeline(toys.ToyModel().eval(), toys.ToyModel(layers=1, seed=1).eval(), nn.Linear(2, 2))
    assert {p.component for p in ak.points(pipe)} == {"unet", "text_encoder"}
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(targets="attn.*@component=text_encoder"))
    assert set(adapters.modules("a")) == {f"attn.{role}@text_encoder.0" for role in "qkvo"}
    assert list(ak.Adapters(pipe.unet)) == ["a"]
    adapters.detach()
    assert list(ak.Adapters(pipe.text_encoder)) == []


def test_initial_values_depend_on_seed_and_point_alone(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("few", ak.LoRA(rank=2, targets="attn.v"), seed=7)
    torch.rand(5)
    adapters.add("many", ak.LoRA(rank=2, targets="all"), seed=7)
    adapters.add("other", ak.LoRA(rank=2, targets="all"), seed=8)
    few, many, other = (adapters.state_dict(name) for name in ("few", "many", "other"))
    for key, tensor in few.items():
        assert torch.equal(tensor, many[key])
        if key.endswith("/A"):
            assert not torch.equal(tensor, other[key])


@pytest.mark.parametrize(
    "name", ["../evil", "/abs", "a/b", "a.b", "", "x" * 65, "a\0b", "CON", "com1", "Lpt9", "-rf", "ä", None, 3]
)
def test_bad_names_are_refused(model: toys.ToyModel, name: str) -> None:
    before = snapshot(model)
    with pytest.raises(errors.InvalidNameError, match="adapter name"):
        ak.Adapters(model).add(name, CONFIGS["lora"])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", ["train", "keys", "forward", "A", "o", "x" * 64, "T_destination", "lpt10"])
def test_names_that_other_libraries_trip_over_work(model: toys.ToyModel, name: str) -> None:
    adapters = ak.Adapters(model)
    adapters.add(name, CONFIGS["lora"])
    randomize(adapters, name)
    assert any(f".{name}." in key for key in model.state_dict())
    adapters.remove(name)


def test_the_last_adapter_takes_along_what_ones_own_block_says(model: toys.ToyModel) -> None:
    adapters, x = ak.Adapters(model), toys.ids()
    base = model(x)
    for block in (adapters.disabled, lambda: adapters.activated("a")):
        adapters.add("a", CONFIGS["lora"])
        with block():
            with pytest.raises(errors.StateError, match="add\\(\\) sets what acts outside"):
                adapters.add("c", CONFIGS["lora"])
            adapters.remove("a")
            assert torch.equal(model(x), base)
            adapters.add("c", CONFIGS["lora"])
            randomize(adapters, "c")
            y = model(x)
            assert not torch.equal(y, base)
        assert adapters.active == {"c": 1.0}
        assert torch.equal(model(x), y)
        adapters.remove("c")


@pytest.mark.parametrize("take", ["remove", "detach", "bake"])
def test_whichever_handle_takes_the_last_adapter_all_begin_anew(model: toys.ToyModel, take: str) -> None:
    config = ak.LoRA(rank=2, targets="mlp.up")
    first, second, x = ak.Adapters(model), ak.Adapters(model), toys.ids()
    first.add("a", config)
    states = [first._state]
    if take == "remove":
        with first.disabled():
            second.remove("a")
            first.add("b", config)
        assert second.active == {"b": 1.0}
    else:
        second.detach() if take == "detach" else second.bake("a")
        first.add("b", config)
    states.append(second._state)
    assert first._state is states[1] is not states[0]
    base = model(x)
    randomize(second, "b")
    assert not torch.equal(model(x), base)
    first.remove("b")
    assert torch.equal(model(x), base)


def test_unknown_names_and_taken_names(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    with pytest.raises(errors.UnknownNameError, match="Nothing is attached"):
        adapters.activate("ink")
    adapters.add("ink", CONFIGS["lora"])
    for call in (
        lambda: adapters.activate("inc"),
        lambda: adapters.activate({"inc": 1.0}),
        lambda: adapters.remove("inc"),
        lambda: adapters.merge("inc"),
        lambda: adapters.train("inc"),
        lambda: adapters.save("inc", "x.safetensors"),
    ):
        with pytest.raises(errors.UnknownNameError, match="Did you mean 'ink'"):
            call()
    with pytest.raises(errors.InvalidNameError, match="exists already"):
        adapters.add("ink", CONFIGS["lora"])
    with pytest.raises(errors.ConfigError, match="named twice"):
        adapters.activate(["ink", "ink"])
    for weight in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(errors.ConfigError, match="finite number"):
            adapters.activate({"ink": weight})  # type: ignore[dict-item]
    adapters.add("kv", CONFIGS["prefix"])
    with pytest.raises(errors.ConfigError, match="must not be negative"):
        adapters.activate({"kv": -1.0})
    assert adapters.active == {"kv": 1.0}


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (ak.LoRA(targets="attn.query"), errors.TargetNotFoundError, "attn.q"),
        (ak.LoRA(targets="attn.q mlp.gate"), errors.TargetNotFoundError, "mlp.gate"),
        (ak.LoRA(targets="attn.q@layer>=9"), errors.TargetNotFoundError, "layer is one of 0, 1"),
        (ak.LoRA(targets="attn.kv"), errors.IncompatibleTargetError, "weight points"),
        (ak.Prefix(targets="mlp.*"), errors.IncompatibleTargetError, "attention points"),
        ("lora", errors.ConfigError, "AdapterConfig"),
    ],
)
def test_targets_that_do_not_fit(
    model: toys.ToyModel, config: ak.AdapterConfig, error: type[Exception], text: str
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=text):
        ak.Adapters(model).add("a", config)
    assert_same(before, snapshot(model))


def test_models_that_nobody_knows() -> None:
    with pytest.raises(errors.UnsupportedModelError, match="no adaptable layer"):
        ak.points(nn.LayerNorm(2))
    with pytest.raises(errors.UnsupportedModelError, match="neither a torch module"):
        ak.Adapters("gpt2")


def test_a_module_whose_forward_was_replaced_is_refused(model: toys.ToyModel) -> None:
    up = model.blocks[1].up
    up.forward = lambda x: x  # type: ignore[method-assign]
    before = snapshot(model)
    with pytest.raises(errors.AttachError, match=r"blocks\.1\.up.*replaced"):
        ak.Adapters(model).add("a", CONFIGS["lora"])
    assert_same(before, snapshot(model))


def test_a_failure_half_way_is_rolled_back(model: toys.ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.engine import attach

    before, calls, real = snapshot(model), [0], attach.attach

    def failing(*args: object) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise MemoryError
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attach, "attach", failing)
    with pytest.raises(MemoryError):
        ak.Adapters(model).add("a", CONFIGS["lora"])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_wide_and_the_output_keeps_the_bases_dtype(dtype: torch.dtype) -> None:
    model = toys.ToyModel().to(dtype).eval()
    for config in CONFIGS.values():
        adapters = ak.Adapters(model)
        adapters.add("a", config)
        randomize(adapters, "a")
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
        assert model(toys.ids()).dtype == dtype
        adapters.activate({"a": 0.5})
        assert model(toys.ids()).dtype == dtype
        adapters.detach()


def test_meta_models_are_mapped_and_adapted() -> None:
    with torch.device("meta"):
        model = toys.ToyModel()
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS["lora"])
    assert all(p.is_meta for p in adapters.parameters("a"))
    adapters.detach()


def test_nothing_keeps_a_removed_adapter_alive(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("keep", CONFIGS["lora"])
    adapters.add("gone", CONFIGS["bottleneck"])
    model(toys.ids())
    watched = [weakref.ref(module) for module in adapters.modules("gone").values()]
    adapters.remove("gone")
    gc.collect()
    assert all(ref() is None for ref in watched)
    assert adapters.active == {}


def test_report_and_repr_show_what_was_injected(model: toys.ToyModel) -> None:
    adapters = ak.Adapters(model)
    adapters.add("ink", ak.LoRA(rank=2, targets="attn.q"))
    text = str(adapters.report())
    assert "ink (lora; weight 1, trainable): 64 parameters" in text
    assert "attn.q x2" in text
    assert "LoRAModule" in repr(model)
    assert "A=(2, 8)" in repr(model)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_without_breaks_and_follows_every_switch(config: ak.AdapterConfig) -> None:
    torch._dynamo.reset()
    model, x = toys.ToyModel().eval(), toys.ids()
    base = model(x)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    adapters.activate({"a": 0.5})
    assert torch.equal(compiled(x), model(x))
    # Entering a block for the first time in a thread once left the compiled graph as it was.
    with adapters.disabled():
        assert torch.equal(compiled(x), base)
    assert torch.equal(compiled(x), model(x))
    assert list(ak.Adapters(compiled)) == ["a"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(config: ak.AdapterConfig, *, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = toys.ToyModel().double()
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomize(adapters, "a")
    h = torch.randn(2, 5, toys.WIDTH, dtype=torch.float64, requires_grad=True)

    def gradients(*, again: bool) -> list[torch.Tensor]:
        x = h
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant) if again else block(x)
        weights = [p for p in adapters.parameters("a") if p.requires_grad]
        for weight in weights:
            weight.grad = None
        x.square().sum().backward()
        return [w.grad.clone() for w in weights if w.grad is not None]

    plain, recomputed = gradients(again=False), gradients(again=True)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_backward_outside_the_block_recomputes_what_acted_in_the_forward() -> None:
    from torch.utils.checkpoint import checkpoint

    model = toys.ToyModel().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, targets="attn.q mlp.up"))
    adapters.add("b", ak.Bottleneck(targets="mlp", activation="gelu", reduction=2))
    randomize(adapters, "a")
    adapters.train("a")
    h = torch.randn(2, 5, toys.WIDTH, dtype=torch.float64, requires_grad=True)
    gradients = []
    for again in (False, True):
        with adapters.activated("a"):
            y = model.blocks[0](h)
            if again:
                y = checkpoint(model.blocks[0], h, use_reentrant=False, context_fn=adapters.recompute_context)
        y.square().sum().backward()
        grads = [p.grad for p in adapters.parameters("a")]
        gradients.append([g.clone() for g in grads if g is not None])
        for p in adapters.parameters("a"):
            p.grad = None
    assert len(gradients[0]) == len(gradients[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_rank_that_no_point_receives_is_an_error(model: toys.ToyModel) -> None:
    with pytest.raises(errors.ConfigError, match=r"ranks: 'mpl\.\*' match none"):
        ak.Adapters(model).add("a", ak.LoRA(targets="attn.* mlp.*", ranks={"mpl.*": 4}))
    ak.Adapters(model).add("a", ak.LoRA(targets="attn.* mlp.*", ranks={"mlp.*": 4}))
    assert ak.Adapters(model).state_dict("a")["mlp.up@toy.0/A"].shape == (4, toys.WIDTH)


def test_a_number_too_large_for_a_float_is_a_typed_error() -> None:
    with pytest.raises(errors.ConfigError, match="alpha must be"):
        ak.LoRA(alpha=10**400)


def test_a_type_of_unknown_origin_makes_up_no_install_line(model: toys.ToyModel) -> None:
    from adapterkit.checkpoint import Checkpoint

    file = Checkpoint.of("gate", {}, {"attn@toy.0": {"gate": torch.zeros(8)}})
    with pytest.raises(errors.UnknownAdapterTypeError, match="register it here in the same way") as caught:
        ak.Adapters(model).install("a", file)
    assert "pip install" not in str(caught.value)
    known = file.replace(distribution="adapterkit-gate", version="2.0")
    with pytest.raises(errors.UnknownAdapterTypeError, match=r"adapterkit-gate 2\.0; .*pip install adapterkit-gate"):
        ak.Adapters(model).install("a", known)


def test_points_for_an_adapter_are_those_where_it_can_act(model: toys.ToyModel) -> None:
    found = ak.points(model, "*@layer=0", adapter=ak.LoRA(rank=2))
    assert {point.kind for point in found} == {"weight"}
    assert set(found.costs) == set(found.ids)
    with pytest.raises(errors.IncompatibleTargetError, match="none of the 2 points"):
        ak.points(model, "attn.kv", adapter=ak.LoRA(rank=2))


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"dtype": "half"}, {"seed": "one"}])
def test_wrong_options_of_add_are_told(options: dict[str, object]) -> None:
    model = torch.nn.Linear(2, 2)
    adapters = ak.Adapters(model)
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        adapters.add("a", ak.LoRA(targets="*"), **options)  # type: ignore[arg-type]
    assert len(adapters) == 0
    assert type(model) is torch.nn.Linear
