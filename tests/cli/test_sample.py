from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from adapterkit.cli.main import main
from adapterkit.training.loop import train
from adapterkit.training.run import load_run
from tests.backends.vision_models import pipeline
from tests.training import toy_task

TINY = ("options.sample_steps=2", "options.resolution=16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a finished run."""
    folder = tmp_path_factory.mktemp("sample")
    torch.manual_seed(0)
    (folder / "words").mkdir()
    (folder / "data").mkdir()
    pipeline(folder / "words").save_pretrained(folder / "base")
    Image.effect_noise((16, 16), 80).save(folder / "data/a.png")
    (folder / "data/a.txt").write_text("one red circle")
    adapter = '{type: lora, rank: 4, targets: "linear@component=unet"}'
    values = {"task": "diffusion", "model": folder / "base", "data": folder / "data", "output": folder / "run"}
    overrides = [*(f"{k}={v}" for k, v in values.items()), f"adapter={adapter}", "steps=4", "learning_rate=0.05", *TINY]
    train(load_run(None, overrides), silent=True)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sample", *map(str, arguments)])


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_run_samples_what_it_showed_while_training(trained: Path, tmp_path: Path):
    output = tmp_path / "new" / "one.png"
    result = call(trained / "run", "--prompt", "one red circle", "-o", output)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert pixels(output) == pixels(trained / "run/samples/step_000004_p0_s42.png")


def test_a_file_with_its_base_gives_the_same_and_weight_0_is_the_base(trained: Path, tmp_path: Path):
    file, base = trained / "run/adapter.safetensors", trained / "base"
    result = call(file, *TINY, "--model", base, "--prompt", "one red circle", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "a.png") == pixels(trained / "run/samples/step_000004_p0_s42.png")
    call(file, *TINY, "--model", base, "--prompt", "one red circle", "--weight", "0", "-o", tmp_path / "b.png")
    assert pixels(tmp_path / "b.png") == pixels(trained / "run/samples/step_000000_p0_s42.png")


def test_several_prompts_and_seeds_are_numbered(trained: Path, tmp_path: Path):
    prompts, seeds = ("--prompt", "one", "--prompt", "two"), ("--seed", "1", "--seed", "2")
    result = call(trained / "run", *prompts, *seeds, "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    names = [f"x_p{p}_s{s}.png" for p in (0, 1) for s in (1, 2)]
    assert [Path(line).name for line in result.stdout.splitlines()] == names
    assert len({pixels(tmp_path / name) for name in names}) == 4


def test_what_is_missing_is_said(trained: Path, tmp_path: Path):
    file = trained / "run/adapter.safetensors"
    without_base = call(file, "--prompt", "one")
    assert (without_base.exit_code, "add --model MODEL" in without_base.stderr) == (2, True)
    empty = call(tmp_path, "--prompt", "one")
    assert (empty.exit_code, "holds no finished run" in empty.stderr) == (1, True)
    absent = call(tmp_path / "none.safetensors", "--model", trained / "base", "--prompt", "one")
    assert (absent.exit_code, "none.safetensors" in absent.stderr) == (1, True)
    assert call(file).exit_code == 2


def test_a_task_that_generates_nothing_says_so(tmp_path: Path):
    train(toy_task.toy_run(tmp_path / "run", steps=1), silent=True)
    result = call(tmp_path / "run", "--prompt", "one")
    assert result.exit_code == 1
    assert "the task 'toy-task' does not generate anything" in result.stderr


def test_a_name_without_an_ending_gets_one_and_an_ending_that_cannot_be_written_is_refused(
    trained: Path, tmp_path: Path
):
    result = call(trained / "run", "--prompt", "red", "-o", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path}/one.png\n"
    result = call(trained / "run", "--prompt", "red", "-o", tmp_path / "one.xyz")
    assert result.exit_code == 2
    assert "one.xyz: the name must end in .png or .jpg" in result.stderr


def test_a_seed_that_no_generator_takes_is_refused(trained: Path, tmp_path: Path):
    assert call(trained / "run", "--prompt", "red", "--seed", 2**63, "-o", tmp_path / "one.png").exit_code == 2
    result = call(trained / "run", f"options.sample_seeds=[{2**63}]", "--prompt", "red", "-o", tmp_path / "one.png")
    assert result.exit_code == 1
    assert "options.sample_seeds.0: " in result.stderr
