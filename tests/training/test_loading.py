"""Code that comes with a model is never run, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

import adapterkit
from adapterkit.errors import ModelNotFoundError
from adapterkit.training import loading
from adapterkit.training.diffusion.loading import load_pipeline
from adapterkit.training.diffusion.options import Options
from adapterkit.training.skeleton import skeleton
from tests.backends.vision_models import vit_config

LOADS: dict[str, Callable[[str], Any]] = {
    "language model": lambda name: loading.load_causal_lm(name, "float32"),
    "classifier": lambda name: loading.load_image_classifier(name, "float32", 2),
    "skeleton": skeleton,
    "pipeline": lambda name: load_pipeline(name, "float32", Options.model_validate({})),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a kind that nobody knows, with code that leaves a trace, before a terminal where "y" is typed."""
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoTokenizer")
    config = {"model_type": "strange", "auto_map": dict.fromkeys(kinds, "code.Strange"), "architectures": ["Strange"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = {"_class_name": ["code", "Strange"], "_diffusers_version": "0.30.0"}
    index |= {part: ["code", "Strange"] for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    trace = f"open({str(tmp_path / 'trace')!r}, 'w')"
    (tmp_path / "code.py").write_text(f"{trace}\nclass Strange: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path


@pytest.mark.parametrize("load", LOADS)
def test_a_models_own_code_is_not_run(folder: Path, load: str):
    if load != "pipeline":
        (folder / "model_index.json").unlink()
    with pytest.raises(ModelNotFoundError):
        LOADS[load](str(folder))
    assert not (folder / "trace").exists()


CONFIGS = {
    "deep": "[" * 100_000,
    "list": "[1]",
    "number": '{"architecture": 5}',
    "steering": '{"architecture": "\\u001b[2J"}',
}


@pytest.mark.parametrize("load", ["language model", "classifier", "skeleton"])
@pytest.mark.parametrize("config", [*CONFIGS, "pipe", "folder"])
def test_a_folder_of_another_kind_is_no_model(tmp_path: Path, load: str, config: str):
    file = tmp_path / "config.json"
    if config == "pipe":
        os.mkfifo(file)
    elif config == "folder":
        file.mkdir()
    else:
        file.write_text(CONFIGS[config])
    with pytest.raises(ModelNotFoundError) as caught:
        LOADS[load](str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["timm:resnt18", "timm:resnt18.a1_in1k"])
def test_a_model_that_timm_does_not_have_is_told_with_what_is_like_it(name: str):
    with pytest.raises(ModelNotFoundError, match=r"timm has no 'resnt18'\. Did you mean .*'resnet18'"):
        loading.load_image_classifier(name, "float32", None)


class Listener(logging.Handler):
    """Hears what transformers says of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    listener, log = Listener(), logging.getLogger("transformers")
    log.addHandler(listener)
    yield listener.heard
    log.removeHandler(listener)


def test_a_fresh_head_is_no_alarm_and_other_weights_that_are_lacking_are(tmp_path: Path, heard: list[str]):
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(num_labels=5))
    model.save_pretrained(tmp_path)
    loading.outline_image_classifier(str(tmp_path), 3)
    loading.load_image_classifier(str(tmp_path), "float32", 3)
    assert heard == []
    left = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if "layernorm" not in key}
    assert len(left) < len(model.state_dict())
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"has no weights for \d+ \(vit\.layernorm, .*\); they are random"):
        loading.load_image_classifier(str(tmp_path), "float32", 3)


def test_every_load_says_that_no_code_is_run():
    calls = [
        (path.name, ast.unparse(node))
        for path in Path(adapterkit.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    assert len(calls) > 5
    onto_a_model = "peft.PeftModel."  # which is there already
    assert not [call for call in calls if "**NO_CODE" not in call[1] and not call[1].startswith(onto_a_model)]
