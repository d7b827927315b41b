from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.formats.registry import named_format
from adapterkit.formats.source import Source
from adapterkit.tools.files import read
from adapterkit.training import yaml_values
from adapterkit.training.checked import CheckedTask
from adapterkit.training.export import libraries
from adapterkit.training.export.checks import Checks
from adapterkit.training.export.record import Record, public_name, record_in
from adapterkit.training.export.scripts import Shown, scripts_metadata
from adapterkit.training.loop import train
from tests.training import toy_task
from tests.training.small_pipeline import CAPTION, small_run, write_base

KOHYA, DIFFUSERS = "export/kohya/run.safetensors", "export/diffusers/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("export"))
    card = "card={trigger: red style, license: mit, description: Circles., tags: 'toy, red'}"
    schedule = "scheduler={type: polynomial, power: 2.0}"
    train(small_run(folder, folder / "run", card, schedule), silent=True)
    return folder


def metadata(path: Path) -> dict[str, str]:
    return dict(Source.of(path).metadata)


@pytest.mark.parametrize("file", [KOHYA, DIFFUSERS])
def test_diffusers_alone_draws_from_the_files_what_the_run_drew(trained: Path, file: str):
    pipe: Any = DiffusionPipeline.from_pretrained(trained / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str((trained / "run" / file).parent), weight_name=Path(file).name)
    generator = torch.Generator().manual_seed(42)
    found = pipe(CAPTION, height=16, width=16, num_inference_steps=2, generator=generator).images[0]
    with Image.open(trained / "run/samples/step_000004_p0_s42.png") as sample:
        wanted = np.asarray(sample, dtype=int)
    with Image.open(trained / "run/samples/step_000000_p0_s42.png") as sample:
        assert np.abs(np.asarray(sample, dtype=int) - wanted).max() > 8
    assert np.abs(np.asarray(found, dtype=int) - wanted).max() <= 1


def test_the_uis_are_told_what_they_show(trained: Path):
    told = metadata(trained / "run" / KOHYA)
    assert told["ss_output_name"] == told["modelspec.title"] == "run"
    assert told["modelspec.trigger_phrase"] == "red style"
    assert told["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert told["modelspec.license"] == "mit"
    assert told["modelspec.resolution"] == "16x16"
    assert told["ss_sd_model_name"] == "base"
    assert json.loads(told["ss_tag_frequency"]) == {"data": {CAPTION: 1}}
    assert json.loads(told["ss_dataset_dirs"]) == {"data": {"n_repeats": 1, "img_count": 1}}
    # the layers have 2 to 8 features: ranks differ
    assert (told["ss_steps"], told["ss_learning_rate"], told["ss_network_dim"]) == ("4", "0.05", "Dynamic")
    assert (told["ss_optimizer"], told["ss_lr_scheduler"]) == ("adamw", "polynomial(power=2.0)")
    assert not any(str(trained) in value for value in told.values())


def test_tags_that_are_told_are_the_most_frequent_ones(trained: Path, tmp_path: Path):
    shown = [Shown("a", f"common, tag {number}") for number in range(600)]
    found = json.loads(scripts_metadata(small_run(trained, tmp_path).config, shown, (8, 8))["ss_tag_frequency"])
    assert len(found["a"]) == 500
    assert found["a"]["common"] == 600


def test_the_adapters_own_file_says_how_to_sample_it(trained: Path):
    options = {"resolution": 16, "sample_steps": 2, "guidance_scale": None, "caption_chunks": 1}
    expected = Record("diffusion", "base", "red style", options)
    for file in ("adapter.safetensors", KOHYA):
        found = read(trained / "run" / file, strict=False).checkpoint
        assert record_in(found.metadata) == expected
        assert found.metadata["modelspec.trigger_phrase"] == "red style"
        assert found.metadata["ss_num_train_images"] == "1"
    assert record_in({}) is None
    assert record_in({"adapterkit.training": "[1]"}) is None
    assert record_in({"adapterkit.training": '{"task": "diffusion"}'}) is None
    assert (public_name("/home/me/secret/base"), public_name("org/base")) == ("base", "org/base")


def test_the_card_shows_samples_and_what_readers_made_of_the_files(trained: Path):
    text = (trained / "run/README.md").read_text()
    head = yaml_values.parse(text.split("---\n")[1])
    assert head["base_model"] == "base"
    assert head["tags"] == ["adapterkit", "lora", "toy", "red"]
    assert (head["license"], head["instance_prompt"]) == ("mit", "red style")
    assert head["widget"][0]["output"] == {"url": "samples/step_000004_p0_s42.png"}
    assert "Circles." in text
    assert "![](samples/step_000000_p0_s42.png) | ![](samples/step_000004_p0_s42.png)" in text
    assert "![strengths.png](samples/strengths.png)" in text
    assert f"| `{KOHYA}` | kohya | adapterkit" in text
    assert "adapterkit sample adapter.safetensors --model base --prompt 'red style ...'" in text
    assert f'pipe.load_lora_weights("export/diffusers", weight_name="{Path(DIFFUSERS).name}")' in text
    assert f"diffusers {diffusers.__version__} agrees (0.0% of the effect apart)" in text
    assert str(trained) not in text


@pytest.fixture(scope="module")
def checks(trained: Path) -> tuple[Any, Checks]:
    """The base, and what checks files on it."""
    task = CheckedTask(small_run(trained, trained / "none"))
    model = task.load_model()
    task.prepare_generation(model, torch.device("cpu"))
    adapters = ak.Adapters(model)
    adapters.load(trained / "run/adapter.safetensors", "own")
    checkpoint = adapters.checkpoint("own")
    adapters.detach()
    with torch.no_grad():
        return model, Checks(task, model, checkpoint, "adapterkit")


def test_a_file_that_is_not_what_was_trained_is_found_out(trained: Path, tmp_path: Path, checks: tuple[Any, Checks]):
    model, check = checks
    before = {key: tensor.clone() for key, tensor in model.unet.state_dict().items()}
    with torch.no_grad():
        assert [one.agrees for one in check.of(named_format("kohya"), trained / "run" / KOHYA)] == [True, True]
        weaker = tmp_path / "weaker.safetensors"
        with safe_open(trained / "run" / KOHYA, "pt") as opened:
            halved = {k: t / 2 if "lora_up" in k else t for k, t in load_file(trained / "run" / KOHYA).items()}
            save_file(halved, weaker, opened.metadata())
        own, theirs = check.of(named_format("kohya"), weaker)
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        broken = check.of(named_format("kohya"), tmp_path / "broken.safetensors")
    assert (own.agrees, theirs.agrees) == (False, False)
    assert own.error is not None
    assert own.error > 0.1
    assert "DIFFERS" in str(theirs)
    assert [one.agrees for one in broken] == [False, False]
    assert "CANNOT READ IT" in str(broken[1])
    after = model.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_library_need_not_know_the_formats_of_others(
    trained: Path, checks: tuple[Any, Checks], monkeypatch: pytest.MonkeyPatch
):
    """What it refuses, or looks past without a word, is told, and is no fault of the file; of its own format it is."""

    def refuse(self: Any, *given: Any, **options: Any) -> None:
        raise KeyError("blocks_0")

    for other, told in ((refuse, " (KeyError: 'blocks_0')"), (lambda self, *given, **options: None, "")):
        monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", other)
        with torch.no_grad():
            formats = [named_format(name) for name in ("kohya", "diffusers")]
            theirs, own = (checks[1].of(format, trained / "run" / KOHYA)[1] for format in formats)
        assert str(theirs) == f"diffusers {diffusers.__version__} does not read this format for such a model{told}"
        assert (theirs.agrees, own.agrees) == (True, False)


def test_formats_can_be_chosen_and_switched_off(trained: Path, tmp_path: Path):
    told = ("export=[comfy]", "export_dtype=float16", "card.title='My red: style'")
    result = train(small_run(trained, tmp_path / "one", *told), silent=True)
    half = load_file(tmp_path / "one/export/comfy/My_red_style.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert result.figures["for comfy"] == str(tmp_path / "one/export/comfy/My_red_style.safetensors")
    assert metadata(tmp_path / "one/export/comfy/My_red_style.safetensors")["modelspec.title"] == "My red: style"
    assert [path.name for path in (tmp_path / "one/export").iterdir()] == ["comfy"]
    train(small_run(trained, tmp_path / "none", "export=[]"), silent=True)
    assert not (tmp_path / "none/export").exists()
    assert (tmp_path / "none/README.md").exists()
    with pytest.raises(ConfigError, match=r"export: unknown format 'koyha'.*'kohya'"):
        small_run(trained, tmp_path / "typo", "export=[koyha]", "card.titel=a")  # all mistakes at once


def test_what_a_format_cannot_say_is_told_before_the_first_step(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = "adapter={type: prefix, length: 2, targets: attn.kv@component=unet}"
    with pytest.raises(ConfigError, match=r"export: kohya cannot hold this adapter: adapter\.safetensors: "):
        train(small_run(trained, tmp_path / "run", adapter, "export=[kohya, native]"), silent=True)
    assert not (tmp_path / "run").exists()
    result = train(small_run(trained, tmp_path / "run", adapter))
    told = capsys.readouterr().err
    assert told.index("export: diffusers cannot hold this adapter: ") < told.index("step 4/4")
    assert "export diffusers: NOT WRITTEN: " in told
    assert "for diffusers" not in result.figures
    assert not (tmp_path / "run/export/diffusers").exists()
    assert not list((tmp_path / "run").glob(".export-*"))


def test_who_else_misreads_a_file_is_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapter = "adapter={type: dora, rank: 4, targets: 'attn.*@component=unet'}"
    result = train(small_run(trained, tmp_path / "run", adapter, "export=[kohya]", "strengths=[]"))
    assert "export kohya: diffusers drops the magnitudes of DoRA\n" in capsys.readouterr().err
    assert "DIFFERS" in result.figures["for kohya"]
    assert "; diffusers drops the magnitudes of DoRA |" in (tmp_path / "run/README.md").read_text()


def test_a_library_that_is_absent_is_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    train(small_run(trained, tmp_path / "run", "export=[kohya]"), silent=True)
    assert (
        f"diffusers {diffusers.__version__} was not asked: pip install peft" in (tmp_path / "run/README.md").read_text()
    )


def test_a_task_that_knows_no_format_leaves_a_card_alone(tmp_path: Path):
    train(toy_task.toy_run(tmp_path / "run", steps=1), silent=True)
    assert not (tmp_path / "run/export").exists()
    text = (tmp_path / "run/README.md").read_text()
    assert "<pre>one 42 False</pre>" in text
