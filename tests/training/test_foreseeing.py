"""A dry run of a style says what pictures and captions become, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.task import DiffusionTask
from adapterkit.training.plan import plan_of
from tests.backends.vision_models import pipeline
from tests.training import tiny_pipelines
from tests.training.test_diffusion import make_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, size in (("square", (16, 16)), ("wide", (64, 16)), ("tall", (20, 30))):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"data/{name}.png")
        (tmp_path / f"data/{name}.txt").write_text("one red circle")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(DiffusionTask, "load_model", refuse)


def test_sizes_cuts_and_tokens(data: Path, tmp_path: Path):
    (tmp_path / "words").mkdir()
    torch.manual_seed(0)
    pipeline(tmp_path / "words").save_pretrained(tmp_path / "model")
    run = make_run(tmp_path / "model", data, tmp_path / "run", trigger="two")
    facts = plan_of(run).facts
    assert facts["pictures"] == "3, of 16 x 16 to 64 x 30 pixels"
    assert facts["size"] == "16 x 16"
    assert facts["sizes"] == "16 x 16 (1), 12 x 20 (1), 32 x 8 (1)"
    assert facts["cut to their sizes"] == "by 10% on average, 1 (tall.png 10%)"
    assert facts["tokens of the longest caption"] == "7 of 16"
    assert facts["longest caption"] == "4 words, of square.png"
    (data / "wide.txt").write_text("one red circle " * 10)
    facts = plan_of(run).facts
    assert facts["captions cut"] == "to 16 tokens, 1 (wide.png, 34 tokens)"
    larger = plan_of(make_run(tmp_path / "model", data, tmp_path / "run", resolution=32)).facts
    assert (larger["size"], larger["enlarged"]) == (
        "32 x 32",
        "2 (square.png 2 times, tall.png 1.3 times)",
    )


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_every_recipe_works_on_an_outline(name: str, data: Path, tmp_path: Path):
    run = make_run(
        tiny_pipelines.saved(name, tmp_path),
        data,
        tmp_path / "run",
        targets="attention@component=transformer",
        resolution=32,
    )
    facts = plan_of(run).facts
    assert facts["size"] == "32 x 32"
    assert "cut to their sizes" in facts
    assert any(name in facts for name in ("tokens of the longest caption", "captions cut"))


def test_a_prompt_of_a_size_that_is_not_drawn_is_told_with_its_line(data: Path, tmp_path: Path):
    (tmp_path / "words").mkdir()
    pipeline(tmp_path / "words").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a\n\nred --w 16 --h 9\nblue --w 8 --h 8\n")
    run = make_run(tmp_path / "model", data, tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 3: size \[9, 16\] of the prompt 'red': .* of 2$"):
        plan_of(run)
