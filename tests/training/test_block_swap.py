"""Blocks that are on the device only while they compute: the same numbers, less memory, and nothing left behind.

The host and the device are the CPU here. Copies are made all the same, and while a block is out its parameters are NaN,
and so is whatever is computed with them.
"""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError
from adapterkit.testing import toys
from adapterkit.training import block_swap
from adapterkit.training.block_swap import BlockSwap
from adapterkit.training.blocks import blocks_of, swapped_blocks, waiting_bytes
from adapterkit.training.language.caches import uncached
from adapterkit.training.loading import checkpoint_activations
from adapterkit.training.loop import train
from adapterkit.training.plan import plan_of
from adapterkit.training.run import load_run
from tests.backends import vision_models
from tests.training.test_loop import assert_same_run
from tests.training.test_signals import send_from
from tests.training.toy_task import ToyTask, toy_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_swap, "_away", lambda host: host.new_full(host.shape, torch.nan))


class Resident:
    """Counts the bytes of swapped weights that are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._there: list[Any] = []
        brought = block_swap._Guest._copy

        def counted(guest: Any, host: Tensor) -> Tensor:
            copy = brought(guest, host)
            self._there = [one for one in self._there if one() is not None] + [weakref.ref(copy.untyped_storage())]
            self.most = max(self.most, sum(one().nbytes() for one in self._there))
            return copy

        monkeypatch.setattr(block_swap._Guest, "_copy", counted)


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    model = t.LlamaForCausalLM(t.LlamaConfig(num_hidden_layers=layers, **sizes)).train()
    return model.requires_grad_(False)


def adapted(model: nn.Module, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", config, seed=1)
    torch.manual_seed(2)
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter, std=0.1)
    return adapters


def gradients(
    adapters: ak.Adapters, compute: Any, *, autocast: bool = False, batches: int = 2
) -> tuple[list[float], list[Tensor]]:
    """Losses, and the gradients that have come together after several batches."""
    torch.manual_seed(3)
    losses = []
    for number in range(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = compute(number)
        loss.backward()
        losses.append(float(loss.detach()))
    found = [p.grad for p in adapters.parameters("a")]
    assert all(grad is not None for grad in found)
    return losses, [grad.clone() for grad in found if grad is not None]


def text(model: nn.Module) -> Any:
    return lambda number: model(input_ids=toys.ids(2, 6, seed=number), use_cache=False).logits.float().square().mean()


def assert_equal(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


@contextlib.contextmanager
def swapped(model: nn.Module, count: int) -> Iterator[BlockSwap]:
    with BlockSwap(model, swapped_blocks(model, count), CPU) as swap:
        yield swap


TYPES = {
    "lora": ak.LoRA(rank=2, targets="attn.* mlp.*", dropout=0.3),
    "at the block itself": ak.Bottleneck(targets="hidden", form="houlsby"),
    "keys and values": ak.Prefix(length=2),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_the_same_and_few_blocks_are_there(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool, autocast: bool
):
    plain, model = llama(), llama()
    for one in (plain, model):
        if checkpointing:
            checkpoint_activations(one)
    config = TYPES["lora"]
    expected = gradients(adapted(plain, config), text(plain), autocast=autocast)
    resident = Resident(monkeypatch)
    with swapped(model, 3):
        found = gradients(adapted(model, config), text(model), autocast=autocast)
    assert_equal(found, expected)
    block = sum(p.nbytes for p in blocks_of(llama())[0].parameters())
    assert 0 < resident.most <= 2 * block  # that which computes, and of the one before what its backward still needs
    assert resident.most < 3 * block


@pytest.mark.parametrize("name", TYPES)
def test_types_that_act_in_and_around_blocks(name: str):
    plain, model = llama(2), llama(2)
    expected = gradients(adapted(plain, TYPES[name]), text(plain))
    with swapped(model, 2):
        found = gradients(adapted(model, TYPES[name]), text(model))
    assert_equal(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed around the blocks"])
def test_a_unet_computes_the_same_with_its_blocks_swapped(checkpointing: bool):
    plain, model = (vision_models.unet_xl() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    if checkpointing:
        plain.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    config = ak.LoRA(rank=2, targets="attn.* cross.* res.*")

    def loss(one: Any) -> Any:
        return lambda number: vision_models.denoise(one.train()).square().mean()

    expected = gradients(adapted(plain, config), loss(plain))
    count = len(blocks_of(model))
    assert count > 2
    with swapped(model, count):
        found = gradients(adapted(model, config), loss(model))
    assert_equal(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_others_recompute(monkeypatch: pytest.MonkeyPatch, reentrant: bool):
    """As timm does it: a checkpoint around each block, within which nothing need be recomputed once more."""
    calls: list[str] = []
    results = []
    for count in (0, 2):
        torch.manual_seed(0)
        model = vision_models.timm_vit().train().requires_grad_(False)
        adapters = adapted(model, ak.LoRA(rank=2, targets="attn.*", dropout=0.3))
        with swapped(model, count):
            mlp = blocks_of(model)[1].get_submodule("mlp")
            mlp.register_forward_pre_hook(lambda *_, run=str(count): calls.append(run))

            def loss(number: int, model: Any = model) -> Tensor:
                x = model.patch_embed(vision_models.images())
                x = model._pos_embed(x).requires_grad_(True)
                for block in model.blocks:
                    x = checkpoint(block, x, use_reentrant=reentrant)
                return x.square().mean()

            results.append(gradients(adapters, loss))
    assert_equal(results[1], results[0])
    assert calls.count("0") == 4  # two batches, forward and again
    assert calls.count("2") == (6 if reentrant else 4)


def test_whoever_computes_with_a_block_that_is_out_has_no_numbers():
    model = llama(2)
    with swapped(model, 1):
        assert blocks_of(model)[1].get_submodule("mlp")(torch.ones(1, 2, 16)).isnan().all()


def test_what_trains_of_the_base_stays():
    """Weights of the base that learn are changed by the optimizer, and not put back."""
    results = []
    for count in (0, 2):
        model: Any = llama(2)
        norm = model.model.layers[1].input_layernorm.weight.requires_grad_(True)
        with swapped(model, count):
            optimizer = torch.optim.SGD([norm], lr=0.1)
            for number in range(3):
                text(model)(number).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(norm.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(16))


def test_an_adapter_starts_from_weights_that_wait():
    starts = []
    for count in (0, 2):
        model = llama(2)
        with swapped(model, count):
            adapters = ak.Adapters(model)
            adapters.add("a", Trainable("attn.q"))
            starts.append([p.detach().clone() for p in adapters.parameters("a")])
            starts[-1].append(text(model)(0).detach())
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    assert not any(one.isnan().any() for one in starts[0])


@pytest.mark.parametrize("end", ["return", "exception in a block", "KeyboardInterrupt"])
def test_all_is_as_it_was_afterwards(end: str):
    model = llama(2)
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    modules = {name: dict(vars(one)) for name, one in model.named_modules()}
    kinds = {"return": None, "exception in a block": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt}
    kind = kinds[end]
    with pytest.raises(kind) if kind else contextlib.nullcontext():  # noqa: SIM117
        with swapped(model, 2):
            if kind:
                blocks_of(model)[1].get_submodule("mlp").register_forward_hook(_raising(kind), always_call=False)
            text(model)(0)
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(value, before[key][1])
    for name, one in model.named_modules():
        assert vars(one).keys() == modules[name].keys()
        assert "forward" not in vars(one)


def _raising(kind: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise kind("stop")

    return hook


def test_an_adapter_at_a_block_survives_the_end_of_the_swap():
    model = llama(2)
    adapters = None
    with swapped(model, 2):
        adapters = adapted(model, TYPES["at the block itself"])
        inside = text(model)(0)
    assert torch.equal(text(model)(0), inside)
    adapters.detach()
    assert torch.equal(text(model)(0), text(llama(2))(0))


def test_which_blocks_there_are():
    model = llama(3)
    assert blocks_of(model) == [*model.model.layers]  # type: ignore[union-attr,operator]
    assert swapped_blocks(model, 2) == [*model.model.layers][1:]  # type: ignore[union-attr,operator]
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 3 blocks, and 4 are to be swapped; say 3 at most"):
        swapped_blocks(model, 4)
    with pytest.raises(ConfigError, match="Linear has 0 blocks"):
        swapped_blocks(nn.Linear(2, 2), 1)
    block = sum(p.numel() for p in model.model.layers[0].parameters())  # type: ignore[union-attr,index]
    assert waiting_bytes(model, 3, "bfloat16") == 2 * 2 * block
    with torch.device("meta"):
        assert waiting_bytes(llama(3), 3, "bfloat16") == 2 * 2 * block


def test_a_decoder_that_classifies_keeps_no_tokens_for_a_block_that_is_computed_again():
    config = t.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    results = []
    for count in (0, 2):
        torch.manual_seed(0)
        model = t.LlamaForSequenceClassification(config).train()
        assert uncached(model) == {"use_cache": False}
        with swapped(model, count):
            adapters = adapted(model, TYPES["lora"])

            def loss(number: int, one: Any = model) -> Tensor:
                return one(input_ids=toys.ids(2, 6, seed=number), **uncached(one)).logits.square().mean()

            results.append(gradients(adapters, loss))
    assert_equal(results[1], results[0])
    assert uncached(nn.Linear(1, 1)) == {}


def test_what_is_outside_of_a_block_too_is_not_swapped():
    model = llama(2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    expected = text(model)(0)
    with swapped(model, 1):
        assert torch.equal(text(model)(0), expected)


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path):
    values: dict[str, Any] = {"gradient_accumulation": 2, "sample_every": 3}
    train(toy_run(tmp_path / "plain", **values), silent=True)
    train(toy_run(tmp_path / "swapped", block_swap=2, **values), silent=True)
    assert_same_run(tmp_path / "plain", tmp_path / "swapped")
    for name in ("samples/step_000003_p1_s42.txt", "adapter.safetensors"):
        if not name.endswith("safetensors"):
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "swapped" / name).read_bytes()


def test_a_run_that_is_interrupted_goes_on_with_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(toy_run(tmp_path / "plain"), silent=True)
    models: list[Any] = []
    load = ToyTask.load_model

    def loaded(self: Any) -> Any:
        models.append(load(self))
        return models[-1]

    monkeypatch.setattr(ToyTask, "load_model", loaded)
    with monkeypatch.context() as patched:
        send_from(patched, ToyTask, "loss", signal.SIGINT, at=4)
        assert train(toy_run(tmp_path / "run", block_swap=2), silent=True).exit_code == 130
    fresh = toys.ToyModel(seed=3).state_dict()
    assert all(torch.equal(models[0].state_dict()[key], value) for key, value in fresh.items())
    train(toy_run(tmp_path / "run", block_swap=1), resume=True, silent=True)
    assert_same_run(tmp_path / "plain", tmp_path / "run")


@pytest.mark.slow
def test_a_style_is_learnt_and_drawn_alike(tmp_path: Path):
    (tmp_path / "words").mkdir()
    (tmp_path / "data").mkdir()
    torch.manual_seed(0)
    vision_models.pipeline(tmp_path / "words").save_pretrained(tmp_path / "model")
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "data/a.png")
    options = {"sample_steps": 2, "prompts": ["one red"], "caption": "one circle"}
    values: dict[str, Any] = {
        "task": "diffusion", "model": str(tmp_path / "model"), "data": str(tmp_path / "data"), "options": options,
        "adapter": {"type": "lora", "rank": 2}, "card": {"title": "a"}, "steps": 3, "learning_rate": 1e-2,
        "sample_every": 2,
    }  # fmt: skip
    for name, count in (("plain", 0), ("swapped", 3)):
        result = train(load_run(None, (), output=str(tmp_path / name), block_swap=count, **values), silent=True)
        assert {"for kohya", "for diffusers"} <= result.figures.keys()
    assert_same_run(tmp_path / "plain", tmp_path / "swapped")
    for file in (tmp_path / "plain/samples").glob("step_*"):
        assert file.read_bytes() == (tmp_path / "swapped/samples" / file.name).read_bytes()
    for file in (tmp_path / "plain/export").rglob("*.safetensors"):
        one, other = (load_file(f) for f in (file, tmp_path / "swapped" / file.relative_to(tmp_path / "plain")))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dry_run_says_what_waits(tmp_path: Path):
    needs = plan_of(toy_run(tmp_path / "run", block_swap=2)).needs
    assert 0 < needs.waiting < needs.weights
    assert "of it on the host)" in str(needs)
    with pytest.raises(ConfigError, match=r"has \d blocks, and 50 are to be swapped"):
        plan_of(toy_run(tmp_path / "run", block_swap=50))
    with pytest.raises(ConfigError, match="block_swap: does not go with torch_compile"):
        toy_run(tmp_path / "run", block_swap=1, torch_compile=True)


@pytest.mark.cuda
def test_on_a_gpu_the_weights_are_on_the_host_in_between(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    device = torch.device("cuda", 0)
    results = []
    for count in (0, 3):
        model = llama().cpu()
        swap = BlockSwap(model, swapped_blocks(model, count), device)
        with swap.aside():
            model.to(device)
        with swap:
            adapters = adapted(model, TYPES["lora"])
            assert all(p.device == device for p in adapters.parameters("a"))
            away = [p for block in swapped_blocks(model, count) for p in block.parameters() if not p.requires_grad]
            assert all(p.device.type == "cpu" and p.is_pinned() for p in away)
            compute = text(model)
            results.append(
                gradients(
                    adapters,
                    lambda number, run=model: (
                        run(input_ids=toys.ids(2, 6, seed=number).to(device), use_cache=False).logits.square().mean()
                    ),
                )
            )
            del compute
    assert_equal(results[1], results[0])
