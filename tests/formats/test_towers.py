"""Files of other tools for models of several towers: modules have the paths of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit as ak
from tests.backends import multimodal_models as models
from tests.backends import vision_checks as checks

TARGETS = {
    "clip": "attn.{q,v} head",
    "llava": "attn.{q,v} mlp.up proj.*",
    "qwen": "attn.q@tower=language mlp.down proj.in",
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_a_folder_of_peft_holds_all_towers(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = models.build(name)
    adapters = ak.Adapters(model := copy.deepcopy(base))
    adapters.add("a", ak.LoRA(rank=2, targets=TARGETS[name]))
    checks.randomise(adapters)
    adapters.freeze()
    with torch.no_grad():
        expected = models.see(model)
        assert not torch.allclose(models.see(base), expected, atol=1e-4)
        adapters.save("a", tmp_path / "ours", format="peft")
        keys = {
            key.removeprefix("base_model.model.") for key in load_file(tmp_path / "ours" / "adapter_model.safetensors")
        }
        assert {key.rpartition(".lora_")[0] for key in keys} == {point.path for point in adapters.points(TARGETS[name])}
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
        torch.testing.assert_close(models.see(theirs.base_model.model), expected, rtol=1e-5, atol=1e-5)
        fresh = ak.Adapters(again := copy.deepcopy(base))
        fresh.load(tmp_path / "ours", "b")
        fresh.activate("b")
        torch.testing.assert_close(models.see(again), expected, rtol=1e-5, atol=1e-5)
        assert {*fresh.modules("b")} == {*adapters.modules("a")}


def test_a_file_for_the_uis_holds_all_towers(tmp_path: Path) -> None:
    base = models.build("llava")
    adapters = ak.Adapters(model := copy.deepcopy(base))
    adapters.add("a", ak.LoRA(rank=2, targets="attn.{q,v} proj.*"))
    checks.randomise(adapters)
    adapters.save("a", tmp_path / "a.safetensors", format="kohya")
    fresh = ak.Adapters(again := copy.deepcopy(base))
    fresh.load(tmp_path / "a.safetensors", "a")
    fresh.activate("a")
    fresh.freeze()
    adapters.freeze()
    with torch.no_grad():
        torch.testing.assert_close(models.see(again), models.see(model), rtol=1e-5, atol=1e-5)
