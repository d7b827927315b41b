"""Routes where a sample becomes several rows: beams, several results, guidance, several images of a prompt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.kernels.batches import Batch
from adapterkit.testing import toys
from tests.adapters.test_prompt import decoder, seq2seq
from tests.values import randomize

IDS = toys.ids(batch=3, length=6)
ROUTES = ["a", None, "b"]
BEAMS = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}


def test_which_rows_stand_for_which_samples() -> None:
    def places(tensor: torch.Tensor, *, run: int = 1, **given: Any) -> tuple[int, ...]:
        return Batch(4, run, **given).fit(tensor).places((0, 1, 2, 3))

    assert places(torch.empty(4)) == (0, 1, 2, 3)
    assert places(torch.empty(8, 5, 6), repeats="each") == (0, 0, 1, 1, 2, 2, 3, 3)
    assert places(torch.empty(8, 5), repeats="whole", copies=2) == (0, 1, 2, 3) * 2
    assert places(torch.empty(16, 5), repeats="whole", copies=2) == (0, 0, 1, 1, 2, 2, 3, 3) * 2
    assert places(torch.empty(2, 5), run=2) == (0, 2)
    values = torch.tensor([1.0, 0.0, 0.5, 1.0])
    tensors: Any = ((torch.empty(16, 5), {"repeats": "whole", "copies": 2}), (torch.empty(2, 1), {"run": 2}))
    for tensor, given in tensors:
        fit = Batch(4, **given).fit(tensor)
        assert fit.of(values).tolist() == [values[i].item() for i in fit.places((0, 1, 2, 3))]
    for tensor, given, told in (
        (torch.empty(8, 5, 6), {}, "has 8 rows"),
        (torch.empty(8, 6), {"repeats": "each"}, "no row per sample"),  # tokens of all rows, or an expert's
        (torch.empty(8, 5, 6), {"repeats": "whole", "at": "attn.q@unet"}, r"at attn.q@unet .* say .*copies=2"),
        (torch.empty(8, 5, 6), {"repeats": "whole", "copies": 3}, "copies"),
        (torch.empty(2, 5, 6), {}, "stands for 2 samples"),
        (torch.empty(3, 5, 6), {"repeats": "each"}, "has 3 rows"),
    ):
        with pytest.raises(errors.RoutingError, match=told):
            Batch(4, **given).fit(tensor)  # type: ignore[arg-type]


def adapted(model: Any, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    for number, name in enumerate("ab"):
        adapters.add(name, config)
        randomize(adapters, name, number)
    return adapters


MODELS = {
    "Llama": functools.partial(decoder, "Llama"),
    "Mixtral": functools.partial(decoder, "Mixtral"),
    "Mamba": functools.partial(decoder, "Mamba"),
    "T5": functools.partial(seq2seq, "T5"),
    "Bart": functools.partial(seq2seq, "Bart"),
    "Marian": functools.partial(seq2seq, "Marian"),
}
CONFIGS = {
    "lora": ak.LoRA(rank=2),
    "by layer": ak.LoRA(rank=2, targets="linear"),
    "prefix": ak.Prefix(length=2, targets="*.kv"),
    "prompt": ak.Prompt(length=2),
    "bottleneck": ak.Bottleneck(width=3),
    "recurrence": ak.LoRA(rank=2, targets="ssm.in"),
}


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "bottleneck"])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_each_sample_keeps_its_adapter_in_all_its_beams(name: str, kind: str) -> None:
    _check_beams(name, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("Mixtral", "lora"), ("Mamba", "recurrence"), ("Bart", "prefix"), ("Marian", "by layer")]
)
def test_other_families_and_beams(name: str, kind: str) -> None:
    _check_beams(name, kind)


def _check_beams(name: str, kind: str) -> None:
    model = MODELS[name]()
    adapters = adapted(model, CONFIGS[kind])
    mask, alone = torch.ones_like(IDS), []
    for row, route in enumerate(ROUTES):
        with adapters.activated(route):
            alone.append(model.generate(IDS[row : row + 1], attention_mask=mask[:1], num_return_sequences=2, **BEAMS))
    for routes in (ROUTES, [route for route in ROUTES for _ in range(3)]):
        with adapters.routed(routes):
            for settings in ({}, {"use_cache": False}):
                found = model.generate(IDS, attention_mask=mask, num_return_sequences=2, **BEAMS, **settings)
                assert torch.equal(found, torch.cat(alone))


def test_samples_that_share_a_row_must_share_their_adapter() -> None:
    model = MODELS["T5"]()
    adapters = adapted(model, CONFIGS["lora"])
    routes = ["a", None, "b"] * 3
    with adapters.routed(routes), pytest.raises(errors.RoutingError, match=r"attn\.q@.*encoder.* stands for 3 samples"):
        model.generate(IDS, **BEAMS)
    with adapters.routed(["a", "b"]), pytest.raises(errors.RoutingError, match="has 3 rows"):
        model.generate(IDS, **BEAMS)


def test_a_batch_of_images_is_not_taken_for_beams() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    adapters = adapted(model, ak.LoRA(rank=2))
    with adapters.routed(["a", None]), pytest.raises(errors.RoutingError, match=r"2 samples.*has 4 rows"):
        model(torch.randn(4, 3, 32, 32))


def test_traced_beams() -> None:
    model = MODELS["Llama"]()
    adapters = adapted(model, CONFIGS["prefix"])
    compiled, x = torch.compile(model, backend="eager"), IDS.repeat_interleave(2, dim=0)
    with adapters.routed(ROUTES), torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, model(x).logits)


def test_weights_of_rows_and_side_inputs_follow_beams() -> None:
    from tests.handle.test_context import Task

    model = MODELS["T5"]()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2))
    adapters.add("t", Task(targets="mlp"))
    for name in "at":
        randomize(adapters, name)
    given = [{"weight": torch.tensor([w]), "task": torch.tensor([i])} for i, w in enumerate((0.0, 0.5, 2.0))]
    alone = []
    for row, one in enumerate(given):
        adapters.activate({"a": one["weight"], "t": 1.0})
        with adapters.context(task=one["task"]):
            alone.append(model.generate(IDS[row : row + 1], **BEAMS))
    adapters.activate({"a": torch.cat([one["weight"] for one in given]), "t": 1.0})
    with adapters.context(task=torch.cat([one["task"] for one in given])):
        assert torch.equal(model.generate(IDS, **BEAMS), torch.cat(alone))


def test_guidance_and_several_images_of_a_prompt(tmp_path: Path) -> None:
    models = pytest.importorskip("tests.backends.vision_models")
    pipe = models.pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    adapters = adapted(pipe, ak.LoRA(rank=2, targets="attn.* cross.* res.time"))
    prompts = ["one red circle", "two blue circles"]
    shape = (4, pipe.unet.config.in_channels, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def draw(prompts: list[str], latents: torch.Tensor, images: int, scale: float) -> torch.Tensor:
        made = pipe(prompts, latents=latents, num_images_per_prompt=images, guidance_scale=scale,
                    num_inference_steps=1, output_type="latent")  # fmt: skip
        return made.images

    for scale, copies in ((5.0, 2), (1.0, 1)):
        alone = []
        for row, route in enumerate(("a", None)):
            with adapters.activated(route):
                alone.append(draw(prompts[row : row + 1], latents[2 * row : 2 * row + 2], 2, scale))
        with adapters.routed(["a", None], copies=copies):
            torch.testing.assert_close(draw(prompts, latents, 2, scale), torch.cat(alone), rtol=1e-4, atol=1e-5)
    with adapters.routed(["a", None]), pytest.raises(errors.RoutingError, match=r"@unet.*copies=2"):
        draw(prompts, latents[:2], 1, 5.0)
    for wrong in (0, True, "2"):
        with pytest.raises(
            errors.ConfigError, match=rf"routed\(\): copies must be None or a whole number from 1, not {wrong!r}"
        ):
            adapters.routed(["a", None], copies=wrong).__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["twice", RuntimeError("no")])
def test_a_backend_that_cannot_say_how_rows_repeat_is_named(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeats(self: Any, model: nn.Module, point: ak.InjectionPoint) -> Any:
        if isinstance(fault, Exception):
            raise fault
        return fault

    toys.register()
    adapters = ak.Adapters(toys.ToyModel())
    monkeypatch.setattr(type(next(iter(adapters._mapped.components.values())).backend), "repeats", repeats)
    with pytest.raises(errors.PluginError, match=r"repeats\(\).*(RuntimeError: no|expected 'each', 'whole' or None)"):
        adapters.add("a", ak.LoRA(rank=1))
    assert not adapters
