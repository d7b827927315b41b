"""README.md and TRAINING.md, followed to the letter: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.training import yaml_values
from adapterkit.training.loop import train
from adapterkit.training.result import Result
from adapterkit.training.run import load_run
from tests.training.language import tiny

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "examples/TRAINING.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: paths below examples/ work, and nothing is written into the repository."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(block: str) -> dict[str, Any]:
    """The names that a block leaves behind. It is run as a module, which dataclasses look up by name."""
    module = sys.modules["readme_block"] = types.ModuleType("readme_block")
    try:
        exec(compile(block, "README.md", "exec"), module.__dict__)
    finally:
        del sys.modules["readme_block"]
    return module.__dict__


def block_with(text: str) -> str:
    [found] = [block for block in blocks("python") if text in block]
    return found


MARKS = ("LlamaForCausalLM", "VisionTransformer", "StableDiffusion", "AdapterTrainer", "Gate", 'format="kohya"')


def test_every_block_has_a_test() -> None:
    for block in blocks("python"):
        assert sum(mark in block for mark in MARKS) == 1


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's, where there is no GPU
def test_trainer(folder: Path) -> None:
    pytest.importorskip("transformers")
    names = execute(block_with("AdapterTrainer"))
    assert names["trainer"].state.global_step == 4
    assert (folder / "mine.safetensors").is_file()
    checkpoint = {path.name for path in (folder / "run/checkpoint-2").iterdir()}
    assert "adapter.safetensors" in checkpoint
    assert not {"model.safetensors", "base.safetensors"} & checkpoint


def test_files_of_other_tools(folder: Path) -> None:
    pytest.importorskip("diffusers")
    names = execute(block_with('format="kohya"'))
    adapters, report = names["adapters"], names["report"]
    with torch.no_grad():
        for parameter in adapters.parameters("ink"):
            parameter.normal_()
    for kind in ("kohya", "comfy", "diffusers", "lycoris"):
        adapters.load(adapters.save("ink", folder / f"again-{kind}.safetensors", format=kind))
        for key, module in adapters.modules("ink").items():
            theirs = adapters.modules(f"again-{kind}")[key]
            torch.testing.assert_close(theirs.delta_weight(), module.delta_weight())
    assert (len(report.points), report.read.format) == (len(adapters.modules("ink")), "kohya")


def test_language(folder: Path) -> None:
    pytest.importorskip("transformers")
    names = execute(block_with("LlamaForCausalLM"))
    assert names["loss"].item() < 5.0  # from log 256 = 5.5
    assert (folder / "mine.safetensors").is_file()


def test_vision(folder: Path) -> None:
    pytest.importorskip("timm")
    names = execute(block_with("VisionTransformer"))
    assert names["loss"].item() < 1.0  # from log 3 = 1.1
    assert {path.name for path in folder.iterdir()} == {"examples", "classes.safetensors"}


@pytest.mark.skipif(not (ROOT / "examples/digits/base/model_index.json").is_file(), reason="the base is not there yet")
def test_diffusion(folder: Path) -> None:
    pytest.importorskip("diffusers")
    names = execute(block_with("StableDiffusion"))
    assert names["adapters"].active == {"style": 0.7}
    assert {path.name for path in folder.iterdir()} == {"examples", "style.safetensors", "three.png"}


def test_the_type_works_and_starts_without_effect(folder: Path) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    gate = execute(block_with("GateModule"))["Gate"]
    model = timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3).eval()
    x = torch.randn(1, 3, 8, 8)
    before = model(x)
    adapters = ak.Adapters(model)
    adapters.add("mine", gate())
    assert torch.equal(model(x), before)
    for parameter in adapters.parameters():
        torch.nn.init.ones_(parameter)
    assert not torch.allclose(model(x), before)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [words[1] for words in commands() if words[0] == "make"] + re.findall(r"`make ([\w-]+)`", TEXT)
    assert len(named) >= 3
    assert set(named) <= set(targets)


def test_subcommands_and_options_exist() -> None:
    called = [words[1:] for words in commands() if words[0] == "adapterkit"]
    assert len(called) >= 5
    for command, *arguments in called:
        usage = CliRunner().invoke(main, [command, "--help"], catch_exceptions=False).output
        assert f"{command} [OPTIONS]" in usage
        for option in (word for word in arguments if word.startswith("-")):
            assert option in usage, f"{command} has no {option}"


def test_the_points_command_runs() -> None:
    pytest.importorskip("timm")
    arguments = next(words[1:] for words in commands() if words[:2] == ["adapterkit", "points"])
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "attn.q" in done.output


def test_verbs_exist() -> None:
    table = TEXT[TEXT.index("| verb |") : TEXT.index("Several active adapters")]
    verbs = set(re.findall(r"`(?:with )?([a-z_]+)(?:\(|`)", table)) - {"in", "len", "train", "freeze"}
    assert len(verbs) >= 15
    for verb in verbs:
        assert hasattr(ak.Adapters, verb), verb


@pytest.mark.parametrize("selector", re.findall(r"^\| (`[^|]+`) \|", TEXT[TEXT.index("| selector |") :][:900], re.M))
def test_selectors_can_be_parsed(selector: str) -> None:
    from adapterkit.selectors import Selector

    for text in re.findall(r"`([^`]+)`", selector):
        Selector(text)


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, "examples/README.md"):
        place = ROOT / page
        for target in re.findall(r"\]\(([^)#]+)\)", place.read_text(encoding="utf-8")):
            assert target.startswith("http") or (place.parent / target).exists(), f"{page}: {target}"


def test_the_keys_of_how_it_learns_are_keys_of_a_run() -> None:
    [block] = [block for block in blocks("yaml") if "torch_compile:" in block]
    base = {"task": "image-classification", "model": "m", "data": "d", "output": "o", "adapter": {"type": "lora"}}
    run = load_run(None, **base, **yaml_values.parse(block))
    assert (run.schedule.factor(50, 100), len(run.config.rates)) == (1.0, 2)  # it begins anew


def recipe(task: str) -> dict[str, Any]:
    [block] = [block for block in blocks("yaml") if f"task: {task}" in block]
    assert len(block.splitlines()) <= 12
    return yaml_values.parse(block)


def run_small(values: dict[str, Any], **others: Any) -> Result:
    """A run of README on a small model and few data."""
    small = {**values, "options": {**values["options"], **others.pop("options", {})}, **others}
    return train(load_run(None, **{key: value for key, value in small.items() if value is not None}), silent=True)


def test_the_style_of_the_readme(folder: Path) -> None:
    values = recipe("diffusion")
    shutil.copytree(ROOT / "examples/digits/style", folder / "pictures")
    done = run_small(
        values, model=str(ROOT / "examples/digits/base"), steps=2, sample_every=None, options={"sample_steps": 2}
    )
    assert done.folder == Path(values["output"])
    assert list((done.folder / "export/kohya").glob("*.safetensors"))
    assert list((done.folder / "export/diffusers").glob("*.safetensors"))


def test_the_classes_of_the_readme(folder: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / "animals" / name).mkdir(parents=True)
        for each in range(3):
            Image.new("RGB", (40, 40), (120 * number, 9 * each, 0)).save(folder / "animals" / name / f"{each}.png")
    done = run_small(
        recipe("image-classification"),
        model="timm:test_vit",
        epochs=1.0,
        batch_size=2,
        options={"model_args": {"pretrained": False}},
    )
    assert "accuracy" in done.figures
    assert (done.folder / "model").is_dir()


def test_the_assistant_of_the_readme(folder: Path) -> None:
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    tiny.rows_to(folder / "chats.jsonl", *[{"messages": turns}] * 6)
    model = tiny.llama(folder / "model", tiny.MARKED)
    done = run_small(recipe("causal-lm"), model=str(model), epochs=1.0, options={"block_size": 32})
    assert done.figures["perplexity"] > 0
    assert done.adapter is not None


def test_every_test_that_the_table_of_features_names_is_there() -> None:
    table = (ROOT / "examples/TRAINING.md").read_text(encoding="utf-8").partition("## What there is")[2]
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| (`[^|]+`) \|$", table, re.MULTILINE)
    assert len(rows) > 35
    for row in rows:
        folder = Path()
        for name in re.findall(r"`([^`]+)`", row):
            path = Path(name) if name.startswith(("tests/", "plugins/")) else folder / name
            assert (ROOT / path).exists(), f"{name} in {row}"
            folder = path.parent
