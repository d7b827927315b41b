"""What is written is loaded by diffusers' own pipelines: equal outputs, and no warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import adapterkit as ak
from tests.formats import pipelines, transformer_pipelines
from tests.formats.pipelines import differences, randomise

UNETS = ("sd1", "sdxl")
PIPELINES = {**pipelines.PIPELINES, **transformer_pipelines.PIPELINES}
MOST = "path:*.to_[qkv] path:*_proj path:*.to_out.0 path:*ff*"
RANKS = {"path:*.to_q": 3, "path:*0.*.to_k": 1, "path:*k_proj": 4}
ALPHAS = {"path:*.to_v": 0.7, "path:*0.*.to_k": 2.0, "path:*v_proj": 5.0}
CONFIGS: dict[str, ak.AdapterConfig] = {
    "uniform": ak.LoRA(rank=2, targets=MOST),
    "alpha": ak.LoRA(rank=2, alpha=3.1, targets=MOST),
    "mixed": ak.LoRA(rank=2, alpha=1.5, ranks=RANKS, alphas=ALPHAS, targets=MOST),
    "everything": ak.LoRA(rank=2, alpha=3.1, targets="linear"),
    "dora": ak.DoRA(rank=2, alpha=1.0, targets=MOST),
}


def run(name: str, pipe: Any) -> dict[str, torch.Tensor]:
    return pipelines.run(pipe) if name in UNETS else transformer_pipelines.run(pipe)


def handle(pipe: Any) -> ak.Adapters:
    """On the pipeline, or on its transformer where that alone is known."""
    try:
        return ak.Adapters(pipe)
    except ak.errors.UnsupportedModelError:
        return ak.Adapters(pipe.transformer)


def header(file: Path) -> dict[str, Any]:
    with safe_open(str(file), "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def check(name: str, config: Any, folder: Path, change: Any = None, **options: Any) -> Path:
    """Writes an adapter, loads it with diffusers and with us, and compares."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    base = run(name, pipe)
    adapters = handle(pipe)
    adapters.add("a", config)
    randomise(adapters)
    if change is not None:
        change(adapters)
    adapters.activate("a")
    wanted = run(name, pipe)
    assert max(differences(wanted, base).values()) > 0.01
    file = adapters.save("a", folder / "a.safetensors", format="diffusers", **options)
    adapters.detach()
    pipe.load_lora_weights(str(folder), weight_name=file.name)
    assert max(differences(run(name, pipe), wanted).values()) < 2e-5
    pipe.unload_lora_weights()
    again = handle(pipe)
    report = again.load(file, "b")
    assert report.read.format == "diffusers"
    assert [*report.read.left_over, *report.read.unmatched] == []
    again.activate("b")
    assert max(differences(run(name, pipe), wanted).values()) < 1e-5
    return file


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_loads_what_is_written(name: str, config: str, tmp_path: Path) -> None:
    check(name, CONFIGS[config], tmp_path)
