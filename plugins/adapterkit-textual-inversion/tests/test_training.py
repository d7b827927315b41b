"""Textual inversion and pivotal tuning in a run of the task `diffusion`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterkit_textual_inversion import adapterkit_register_adapters, adapterkit_register_formats
from PIL import Image
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.torchvision_ops import ensure_torchvision_ops
from adapterkit.training.loop import train
from adapterkit.training.run import Run, load_run


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    manager = ak.get_plugin_manager()
    known = "textual_inversion" in manager.adapters()
    if not known:
        hooks = (adapterkit_register_adapters, adapterkit_register_formats)
        plugin = type("Plugin", (), {hook.__name__: staticmethod(hook) for hook in hooks})()
        manager.register(plugin, name="textual_inversion_trained")
    yield
    if not known:
        manager.unregister(name="textual_inversion_trained")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    ensure_torchvision_ops()
    from tests.backends.vision_models import pipeline, pipeline_xl

    folder = tmp_path_factory.mktemp("inversion")
    for name in ("words", "words_xl", "data"):
        (folder / name).mkdir()
    torch.manual_seed(0)
    pipeline(folder / "words").save_pretrained(folder / "model")
    pipeline_xl(folder / "words_xl").save_pretrained(folder / "model_xl")
    for number in range(2):
        Image.effect_noise((16, 16), 90).convert("RGB").save(folder / f"data/{number}.png")
        (folder / f"data/{number}.txt").write_text("one circle")
    return folder


WORD = {"type": "textual_inversion", "tokens": ["<ink>"], "vectors": 2}
STYLE = {"type": "lora", "rank": 2, "targets": "attention@component=unet"}


def make_run(folder: Path, output: Path, adapter: dict[str, Any], model: str = "model", **values: Any) -> Run:
    given: dict[str, Any] = {
        "task": "diffusion",
        "model": str(folder / model),
        "data": str(folder / "data"),
        "output": str(output),
        "adapter": adapter,
        "options": {"sample_steps": 2, "prompts": ["one <ink>"], "trigger": "<ink>", "caption_dropout": 0.0},
        "steps": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
    }
    return load_run(None, (), **{**given, **values})


@pytest.mark.parametrize("model", ["model", "model_xl"])
def test_a_word_is_learnt_and_said_in_samples(folder: Path, tmp_path: Path, model: str):
    result = train(make_run(folder, tmp_path / "run", WORD, model), silent=True)
    assert "strengths" not in result.figures  # a word acts or does not
    weights = load_file(tmp_path / "run/adapter.safetensors")
    values = {key: value for key, value in weights.items() if key.endswith("/values")}
    assert len(values) == (1 if model == "model" else 2)
    assert all(not torch.equal(value[0], value[1]) for value in values.values())  # they began alike
    samples = [tmp_path / f"run/samples/step_{step:06d}_p0_s42.png" for step in (0, 4)]
    assert samples[0].read_bytes() != samples[1].read_bytes()


def test_a_run_that_is_resumed_learns_the_same_word(folder: Path, tmp_path: Path):
    train(make_run(folder, tmp_path / "whole", WORD), silent=True)
    train(make_run(folder, tmp_path / "parts", WORD, steps=2), silent=True)
    train(make_run(folder, tmp_path / "parts", WORD), resume=True, silent=True)
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_pivotal_tuning_learns_a_word_and_a_style(folder: Path, tmp_path: Path):
    parts = [{"type": one["type"], "config": {k: v for k, v in one.items() if k != "type"}} for one in (WORD, STYLE)]
    both = {"type": "union", "parts": parts}
    train(make_run(folder, tmp_path / "run", both), silent=True)
    weights = load_file(tmp_path / "run/adapter.safetensors")
    moved = {key for key, value in weights.items() if key.endswith(".B") and value.any()}
    assert moved
    [values] = [value for key, value in weights.items() if key.endswith(".values")]
    assert not torch.equal(values[0], values[1])


def test_a_word_is_not_said_where_nobody_knows_it(folder: Path, tmp_path: Path):
    task: Any = make_run(folder, tmp_path / "run", WORD).make_task()
    pipe = task.load_model()
    assert task.words(["one <ink> circle"]) == ["one <ink> circle"]  # a string like others so far
    adapters = ak.Adapters(pipe)
    adapters.add("ink", make_run(folder, tmp_path / "run", WORD).adapter)
    assert task.words(["one <ink> circle"]) == ["one <ink> <ink>#1 circle"]
    assert len(pipe.tokenizer("<ink> <ink>#1", add_special_tokens=False).input_ids) == 2
    assert pipe.maybe_convert_prompt("one <ink> <ink>#1", pipe.tokenizer) == "one <ink> <ink>#1"  # not twice
    with adapters.disabled():
        assert task.words(["one <ink> circle"]) == ["one circle"]
    adapters.detach()
    assert task.words(["one <ink> circle"]) == ["one circle"]
