from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from adapterkit.cli.main import main
from adapterkit.training.diffusion.task import DiffusionTask
from adapterkit.training.loop import train
from tests.training import toy_task
from tests.training.small_pipeline import CAPTION, small_run, write_base

PROMPT = ("--prompt", CAPTION)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a finished run and one that was stopped after two of four steps."""
    folder = write_base(tmp_path_factory.mktemp("sample"))
    train(small_run(folder, folder / "run", "checkpoint_every=2", "export=[kohya]"), silent=True)
    shutil.copytree(folder / "run", folder / "stopped")
    (folder / "stopped/adapter.safetensors").unlink()
    shutil.rmtree(folder / "stopped/checkpoints/step-000004")
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


@pytest.mark.parametrize("file", ["adapter.safetensors", "export/kohya/run.safetensors"])
def test_a_file_draws_as_its_run_did_and_weight_0_is_the_base(trained: Path, tmp_path: Path, file: str):
    base = ("--model", trained / "base")
    result = call(trained / "run" / file, *base, *PROMPT, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "a.png") == pixels(trained / "run/samples/step_000004_p0_s42.png")
    call(trained / "run" / file, *base, *PROMPT, "--weight", "0", "-o", tmp_path / "b.png")
    assert pixels(tmp_path / "b.png") == pixels(trained / "run/samples/step_000000_p0_s42.png")
    call(trained / "run" / file, *base, *PROMPT, "options.resolution=8", "-o", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (8, 8)


def test_a_file_finds_its_base_where_the_run_named_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trained)  # of an absolute path the file keeps the name alone
    result = call(trained / "run/adapter.safetensors", *PROMPT, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "a.png") == pixels(trained / "run/samples/step_000004_p0_s42.png")


def test_checkpoints_are_sampled_by_their_step_and_a_stopped_run_at_its_newest(trained: Path, tmp_path: Path):
    result = call(f"{trained}/run@2", *PROMPT, "-o", tmp_path / "two.png")
    assert result.exit_code == 0, result.output
    result = call(trained / "stopped", *PROMPT, "-o", tmp_path / "stopped.png")
    assert "stopped is not finished: its newest checkpoint is of step 2" in result.stderr
    assert pixels(tmp_path / "two.png") == pixels(tmp_path / "stopped.png")
    assert pixels(tmp_path / "two.png") != pixels(trained / "run/samples/step_000004_p0_s42.png")
    shutil.copytree(trained / "run/checkpoints/step-000002", trained / "stopped/best")
    call(f"{trained}/stopped@best", *PROMPT, "-o", tmp_path / "best.png")
    assert pixels(tmp_path / "best.png") == pixels(tmp_path / "two.png")
    assert "run keeps no best adapter; a run whose `best` names a figure does" in call(f"{trained}/run@best").stderr
    result = call(f"{trained}/run@3", *PROMPT)
    assert (result.exit_code, "no checkpoint of step 3; there are 2, 4" in result.stderr) == (1, True)


def test_without_a_prompt_the_runs_own_are_drawn(trained: Path, tmp_path: Path):
    result = call(trained / "run", f"options.prompts=[{CAPTION}]", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "a.png") == pixels(trained / "run/samples/step_000004_p0_s42.png")
    result = call(trained / "run")
    assert (result.exit_code, "add --prompt TEXT or --prompts FILE" in result.stderr) == (2, True)


def test_several_weights_and_files_are_drawn_with_one_load_and_shown_side_by_side(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: list[object] = []
    load = DiffusionTask.load_model
    monkeypatch.setattr(DiffusionTask, "load_model", lambda self: loads.append(self) or load(self))
    weights = ("--weight", "0", "--weight", "1")
    result = call(trained / "run", f"{trained}/run@2", *PROMPT, *weights, "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    names = ["x_run_w0.png", "x_run_w1.png", "x_run@2_w0.png", "x_run@2_w1.png", "x_grid.png"]
    assert [Path(line).name for line in result.stdout.splitlines()] == names
    assert len(loads) == 1
    base, last, same, early = (pixels(tmp_path / name) for name in names[:4])
    assert base == same == pixels(trained / "run/samples/step_000000_p0_s42.png")
    assert last == pixels(trained / "run/samples/step_000004_p0_s42.png")
    assert len({base, last, early}) == 3


def test_adapters_act_together_each_with_its_weight(trained: Path, tmp_path: Path):
    places = (trained / "run", trained / "run/adapter.safetensors", "--together")
    halves = ("--weight", "0.25", "--weight", "0.75")
    result = call(*places, *PROMPT, *halves, "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "x.png") == pixels(trained / "run/samples/step_000004_p0_s42.png")
    result = call(*places, *PROMPT, "--weight", "1", "-o", tmp_path / "x.png")
    assert "2 adapters act together and there are 1 weights" in result.stderr


def test_prompts_come_from_a_file_with_their_own_settings(trained: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text(f"{CAPTION} --am 0\nblue --w 8 --h 24 --d 3\n")
    result = call(trained / "run", "--prompts", tmp_path / "p.txt", "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "x_p0_s42.png") == pixels(trained / "run/samples/step_000000_p0_s42.png")
    with Image.open(tmp_path / "x_p1_s3.png") as image:
        assert image.size == (8, 24)
    result = call(trained / "run", "--prompts", tmp_path / "absent.txt")
    assert (result.exit_code, "absent.txt" in result.stderr) == (1, True)


def test_nothing_is_overwritten_that_was_not_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = trained / "run"
    assert call(run, *PROMPT).stdout == "sample.png\n"
    assert call(run, *PROMPT, "--seed", "1", "--seed", "2").stdout == "sample-2_p0_s1.png\nsample-2_p0_s2.png\n"
    assert call(run, *PROMPT).stdout == "sample-3.png\n"


def test_a_wrong_line_of_a_file_of_prompts_is_told_once(trained: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text("one\ntwo --x 9\n", encoding="utf-8")
    result = call(trained / "run", "--prompts", tmp_path / "p.txt", "-o", tmp_path / "x.png")
    assert result.exit_code == 1
    assert f"{tmp_path / 'p.txt'}: line 2: unknown flag --x" in result.stderr
    assert result.stderr.count("p.txt") == 1


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
    assert without_base.exit_code == 1
    assert "says that its base is base; --model MODEL names another" in without_base.stderr
    assert "there is no such folder" in without_base.stderr
    save_file(load_file(trained / "run/export/kohya/run.safetensors"), tmp_path / "bare.safetensors")
    bare = call(tmp_path / "bare.safetensors", "--prompt", "one")
    assert (bare.exit_code, "does not say which base it is for; add --model MODEL" in bare.stderr) == (1, True)
    empty = call(tmp_path, "--prompt", "one")
    assert (empty.exit_code, "is a folder" in empty.stderr) == (1, True)
    absent = call(tmp_path / "none.safetensors", "--model", trained / "base", "--prompt", "one")
    assert (absent.exit_code, "none.safetensors" in absent.stderr) == (1, True)


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
