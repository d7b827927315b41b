"""Adapters of PEFT: what its files say is what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.formats.source import Source


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, str(path / "adapter_model.safetensors"))
    return path


def test_ranks_and_alphas_of_patterns_are_those_of_their_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": {"1": 2}, "alpha_pattern": {"^1": 3}}
    a, b = torch.randn(1, 4), torch.randn(3, 1)
    c, d = torch.randn(2, 3), torch.randn(5, 2)
    names = ("0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B")
    path = folder(
        tmp_path / "it",
        config,
        {f"base_model.model.{name}.weight": t for name, t in zip(names, (a, b, c, d), strict=True)},
    )
    adapters = ak.Adapters(model)
    report = adapters.load(path)
    assert report.read.format == "peft"
    adapters.activate("it")
    x = torch.randn(2, 4)
    hidden = x @ (model[0].weight + 2 * b @ a).mT + model[0].bias
    torch.testing.assert_close(model(x), hidden @ (model[1].weight + 1.5 * d @ c).mT + model[1].bias)


def test_what_is_written_reads_back_with_mixed_ranks_and_alphas(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 5, 3, padding=1), nn.Linear(4, 4))
    adapters = ak.Adapters(model)
    adapters.add("it", ak.LoRA("all", rank=2, alphas={"conv": 5.0}, ranks={"conv": 3}))
    for module in adapters.modules("it").values():
        nn.init.normal_(module.B)  # type: ignore[arg-type]
    adapters.save("it", tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"1": 3}
    assert config["alpha_pattern"] == {"1": 5.0}
    adapters.load(tmp_path / "out", "back")
    for first, second in zip(adapters.modules("it").values(), adapters.modules("back").values(), strict=True):
        assert torch.equal(first.A, second.A)  # type: ignore[arg-type]
        assert torch.equal(first.B, second.B)  # type: ignore[arg-type]


def test_a_header_that_is_as_long_as_a_pickle_begins_is_none(tmp_path: Path) -> None:
    name = "base_model.model.0.lora_A.weight"
    for length in range(1, 700):
        save_file({name: torch.ones(1, 2)}, str(tmp_path / "a.safetensors"), {"x": "y" * length})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no header of this length")
    source = Source.of(tmp_path / "a.safetensors", allow_pickle=True)
    assert list(source.entries) == [name]
