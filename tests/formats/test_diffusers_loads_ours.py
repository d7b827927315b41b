"""What is written is loaded by diffusers' own pipelines: equal outputs, and no warning."""

from __future__ import annotations

import json
import warnings
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
PATHS = {
    "rank": 2,
    "alpha": 3.1,
    "ranks": {"path:*0.*.*to_q": 3},
    "alphas": {"path:*.to_v": 0.7, "path:*0.*.*to_k": 5.0},
}
CONFIGS: dict[str, ak.AdapterConfig] = {
    "uniform": ak.LoRA(rank=2, targets="linear"),
    "alpha": ak.LoRA(rank=2, alpha=3.1, targets="linear"),
    "mixed": ak.LoRA(**PATHS, targets="linear"),
    "dora": ak.DoRA(rank=2, alpha=1.0, targets="linear"),
}


def run(name: str, pipe: Any) -> dict[str, torch.Tensor]:
    return pipelines.run(pipe) if name in UNETS else transformer_pipelines.run(pipe)


def header(file: Path) -> dict[str, Any]:
    with safe_open(str(file), "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def check(name: str, config: Any, folder: Path, change: Any = None, **options: Any) -> Path:
    """Writes an adapter, loads it with diffusers and with us, and compares."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    base = run(name, pipe)
    adapters = ak.Adapters(pipe)
    adapters.add("a", config)
    randomise(adapters)
    if change is not None:
        change(adapters)
    adapters.activate("a")
    wanted = run(name, pipe)
    assert max(differences(wanted, base).values()) > 0.01
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has alpha in its metadata")
        file = adapters.save("a", folder / "a.safetensors", format="diffusers", **options)
    adapters.detach()
    pipe.load_lora_weights(str(folder), weight_name=file.name)
    assert max(differences(run(name, pipe), wanted).values()) < 2e-5
    pipe.unload_lora_weights()
    again = ak.Adapters(pipe)
    report = again.load(file, "b")
    assert report.read.format == "diffusers"
    assert [*report.read.left_over, *report.read.unmatched] == []
    again.activate("b")
    assert max(differences(run(name, pipe), wanted).values()) < 1e-5
    return file


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_loads_what_is_written(name: str, config: str, tmp_path: Path) -> None:
    # Of a fused layer DoRA acts on the whole, by name; at a part of the input it does not act.
    parts = {"flux": "attn.{q,k,v} mlp.up", "flux2": "path:transformer_blocks.*.attn.to_? fused.mlp"}
    own = CONFIGS[config] if config != "dora" or name not in parts else ak.DoRA(rank=2, targets=parts[name])
    check(name, own, tmp_path)


TEXT = "@component=text_encoder"
SPECIAL: dict[str, tuple[str, ak.AdapterConfig]] = {
    "convolutions": ("sd1", ak.LoRA(rank=3, alpha=1.0, ranks={"res.conv*": 2}, targets="linear res.conv*")),
    "convolutions, DoRA": ("sd1", ak.DoRA(rank=2, targets="attn.q res.conv* down.conv")),
    "a text encoder alone": ("sd1", ak.LoRA(rank=2, alpha=3.1, targets=f"linear{TEXT}")),
    "no attention of a text encoder": ("sd1", ak.LoRA(rank=2, alpha=3.1, targets=f"mlp.*{TEXT}")),
    "no attention of a text encoder, DoRA": ("sd1", ak.DoRA(rank=2, targets=f"mlp.*{TEXT}")),
    "a projection of text alone": ("sdxl", ak.LoRA(rank=2, targets="path:text_projection")),
    "rank-stabilized": ("sd3", ak.LoRA(rank=3, alpha=4.0, scaling="rank_stabilized", targets="attn.*")),
    "a whole name that is an end": (
        "flux",
        ak.LoRA(rank=2, ranks={"path:proj_out": 3}, targets="path:proj_out attn.o"),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_diffusers_loads_special_cases(name: str, tmp_path: Path) -> None:
    check(*SPECIAL[name], tmp_path)


def test_diffusers_loads_dora_of_several_dtypes(tmp_path: Path) -> None:
    def halve(adapters: ak.Adapters) -> None:
        for module in adapters.modules("a").values():
            for name in ("A", "B"):
                parameter = getattr(module, name)
                parameter.data = parameter.data.bfloat16()

    check("flux2", ak.DoRA(rank=2, targets="path:transformer_blocks.*.attn.to_? fused.mlp"), tmp_path, halve)
