from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from adapterkit.errors import ConfigError
from adapterkit.training.loop import train
from adapterkit.training.samples.previews import Previews
from adapterkit.training.samples.sample import Sample
from tests.training import toy_task
from tests.training.small_pipeline import CAPTION, small_run, write_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("previews"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_each_prompt_is_drawn_by_its_own_settings(folder: Path, tmp_path: Path):
    file = tmp_path / "prompts.yaml"
    half = f"{{prompt: {CAPTION}, weight: 0.5}}"
    blue = "{prompt: blue, size: [8, 24], seed: [1, 2], negative: red, guidance: 2}"
    file.write_text(f"- {CAPTION}\n- {half}\n- {blue}\n")
    run = small_run(folder, tmp_path / "run", f"options.prompts={file}", "export=[]", "strengths=[0.0, 0.5, 1.0]")
    result = train(run, silent=True)
    samples = tmp_path / "run/samples"
    with Image.open(samples / "step_000004_p2_s1.png") as image:
        assert image.size == (24, 8)
    assert pixels(samples / "step_000004_p2_s1.png") != pixels(samples / "step_000004_p2_s2.png")
    assert pixels(samples / "step_000004_p1_s42.png") == pixels(samples / "weight_0.5_p0_s42.png")
    assert pixels(samples / "step_000004_p1_s42.png") != pixels(samples / "step_000004_p0_s42.png")
    assert not (samples / "weight_1_p0_s42.png").exists()  # the last step's are shown in its place
    assert pixels(samples / "weight_1_p1_s42.png") == pixels(samples / "step_000004_p0_s42.png")
    assert result.figures["strengths"] == str(samples / "strengths.png")
    assert run.resolved()["options"]["prompts"][1] == {"prompt": CAPTION, "weight": 0.5}


def test_a_negative_prompt_acts_and_one_that_a_pipeline_does_not_take_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    task = small_run(folder, tmp_path).make_task()
    model = task.load_model()
    task.prepare_generation(model, torch.device("cpu"))
    with torch.no_grad():
        task.generate(Sample("red"), tmp_path / "plain.png")
        task.generate(Sample("red", negative="blue circle"), tmp_path / "negative.png")
        assert pixels(tmp_path / "plain.png") != pixels(tmp_path / "negative.png")
        with pytest.raises(ConfigError, match=r"size \[9, 16\] of the prompt 'red': sides must be a multiple of 2"):
            task.generate(Sample("red", size=(9, 16)), tmp_path / "odd.png")
        monkeypatch.setattr(type(model), "__call__", lambda self, prompt: None)
        with pytest.raises(ConfigError, match="StableDiffusionPipeline takes no negative prompt; leave out 'blue'"):
            task.generate(Sample("red", negative="blue"), tmp_path / "none.png")


def test_samples_can_be_switched_off(folder: Path, tmp_path: Path):
    result = train(small_run(folder, tmp_path / "run", "samples=false", "export=[]"), silent=True)
    assert list((tmp_path / "run/samples").iterdir()) == []
    assert "grid" not in result.figures
    assert "## Samples" not in (tmp_path / "run/README.md").read_text()
    toy = train(toy_task.toy_run(tmp_path / "toy", steps=1, samples=False), silent=True)
    assert "entropy" in toy.figures


def test_texts_are_told_and_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(toy_task.toy_run(tmp_path / "run", steps=2, sample_every=1, strengths=[0.0, 2.0]))
    assert "\n  two (seed 42):\n  two 42 False\n" in capsys.readouterr().err
    page = (tmp_path / "run/samples/grid.md").read_text()
    assert (
        page.index("## one (seed 42)\n\nbase\n\n<pre>one 42 False</pre>") < page.index("step 1") < page.index("step 2")
    )
    assert "weight 2\n\n<pre>two 42 False</pre>" in Path(result.figures["strengths"]).read_text()


def test_a_grid_has_at_most_eight_columns_the_first_and_the_last_among_them(tmp_path: Path):
    run = toy_task.toy_run(tmp_path / "run")
    previews = Previews(run.make_task(), tmp_path)
    for step in range(0, 210, 10):
        (tmp_path / f"step_{step:06d}_p0_s42.txt").write_text("")
    (tmp_path / "step_000999_p7_s1.txt").write_text("another prompt's, of an earlier run")
    steps = previews.steps()
    assert (len(steps), steps[0], steps[-1]) == (8, 0, 200)
    assert steps == sorted(set(steps))
