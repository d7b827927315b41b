"""Other libraries load our files, and what differs is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.errors import MissingDependencyError, ModelNotFoundError
from adapterkit.tools import verify as verify_module
from adapterkit.tools.verify import load_model, verify
from tests.backends.vision_models import pipeline

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries'


def randomised(model: Any, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapters


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("verify") / "llama"
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify_diffusion")
    (folder / "words").mkdir()
    torch.manual_seed(0)
    pipeline(folder / "words").save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("format", ["native", "peft"])
def test_peft_makes_the_same_of_a_file(llama: Path, tmp_path: Path, format: str):
    adapters = randomised(
        load_model(str(llama)), ak.LoRA(rank=2, alpha=3, ranks={"mlp.*": 3}, targets="attn.q mlp.down")
    )
    [found] = verify(adapters.save("a", tmp_path / "a", format=format), str(llama))
    assert found.agrees, found
    assert found.library.startswith("peft ")
    assert (found.format, found.layers, found.changed) == ("peft", 2 * 7 + 3, 5)


def test_a_file_that_another_library_refuses(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapters = randomised(load_model(str(llama)), ak.LoRA(rank=2, targets="attn.q"))
    file = adapters.save("a", tmp_path / "a")

    def refuse(model: object, path: Path) -> None:
        raise RuntimeError("size mismatch\nfor lora_A")

    monkeypatch.setattr(verify_module, "_PEFT", dataclasses.replace(verify_module._PEFT, load=refuse))
    result = call("verify", file, "--base", llama)
    assert result.exit_code == 1
    assert "cannot be compared: RuntimeError: size mismatch for lora_A" in result.stdout


def test_what_cannot_be_written_for_another_library(llama: Path, tmp_path: Path):
    adapters = randomised(load_model(str(llama)), ak.Bottleneck(width=2, targets="mlp"))
    [found] = verify(adapters.save("a", tmp_path / "a"), str(llama))
    assert not found.agrees
    assert "it cannot be written for it" in found.problem


def test_a_library_that_is_not_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapters = randomised(load_model(str(llama)), ak.LoRA(rank=2, targets="attn.q"))
    monkeypatch.setattr(verify_module, "_PEFT", dataclasses.replace(verify_module._PEFT, name="no_such_library"))
    with pytest.raises(MissingDependencyError, match="pip install no_such_library"):
        verify(adapters.save("a", tmp_path / "a"), str(llama))


@pytest.mark.parametrize("format", ["native", "diffusers", "kohya"])
def test_diffusers_makes_the_same_of_a_file(diffusion: Path, tmp_path: Path, format: str):
    adapters = randomised(load_model(str(diffusion)), ak.LoRA(rank=2, alpha=3, targets="attention"))
    file = adapters.save("a", tmp_path / "a.safetensors", format=format)
    [found] = verify(file, str(diffusion))
    assert found.agrees, found
    assert found.changed > 10
    result = call("verify", file, "--base", diffusion)
    assert result.exit_code == 0, result.output
    assert "equal outputs" in result.stdout


def test_what_diffusers_reads_otherwise_is_found(diffusion: Path, tmp_path: Path):
    adapters = randomised(load_model(str(diffusion)), ak.LoRA(rank=2, alpha=3, targets="attention"))
    file = adapters.save("a", tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(file)
    for number, key in enumerate(key for key in tensors if key.endswith(".alpha")):
        tensors[key] = tensors[key] * (1 + number % 2)
    save_file(tensors, file)
    result = call("verify", file, "--base", diffusion, "--json")
    assert result.exit_code == 1
    [found] = json.loads(result.stdout)
    assert found["error"] > 0.01
    assert "attn" in found["where"]
    assert not found["agrees"]


def test_what_is_no_model(tmp_path: Path):
    with pytest.raises(ModelNotFoundError):
        load_model(str(tmp_path / "nowhere"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_part_of_a_pipeline_is_told_apart(diffusion: Path):
    with pytest.raises(ModelNotFoundError, match="is one part of a pipeline of diffusers; name the whole"):
        load_model(str(diffusion / "unet"))
