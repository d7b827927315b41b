"""Files for the UIs, read by diffusers' own loader: equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adapterkit as ak
from tests.formats.pipelines import PIPELINES, differences, randomise, run

CONFIGS: dict[str, Any] = {
    "uniform": {"rank": 2, "alpha": 1.5, "targets": "attn.* cross.* mlp.* proj.*"},
    "mixed": {
        "rank": 2,
        "alpha": 1.5,
        "ranks": {"mlp.*": 3, "@component=text_encoder": 1},
        "alphas": {"attn.q": 0.7, "cross.*": 2.0},
        "targets": "attn.* cross.* mlp.* proj.*",
    },
    "convolutions": {
        "rank": 3,
        "alpha": 1.0,
        "ranks": {"res.conv*": 2},
        "alphas": {"res.conv*": 0.5},
        "targets": "attn.* cross.* mlp.* proj.* res.*",
    },
    "everything": {"rank": 2, "alpha": 1.0, "alphas": {"@component=unet": 1.5}, "targets": "all"},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_reads_what_is_written(name: str, config: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name]()
    base = run(pipe)
    adapters = ak.Adapters(pipe)
    adapters.add("a", ak.LoRA(**CONFIGS[config]))
    randomise(adapters)
    adapters.activate("a")
    wanted = run(pipe)
    assert min(differences(wanted, base).values()) > 0.01
    file = adapters.save("a", tmp_path / "a.safetensors", format="kohya")
    adapters.detach()
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert max(differences(run(pipe), wanted).values()) < 1e-5
    pipe.unload_lora_weights()
    again = ak.Adapters(pipe)
    report = again.load(file)
    assert [*report.read.left_over, *report.read.unmatched] == []
    again.activate(report.name)
    assert max(differences(run(pipe), wanted).values()) < 1e-5
