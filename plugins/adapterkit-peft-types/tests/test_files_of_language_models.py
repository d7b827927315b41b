"""Files of PEFT's types that act on language models: tasks of rows, prefixes, and types that are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 2, 3, 4], [5, 19, 0, 7]])


def close(found: Tensor, expected: Tensor) -> bool:
    return (found - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, use_cache=False, **size)).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PolyConfig", {"r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 2, "target_modules": ["q_proj", "up_proj"]}),
        ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2, "num_virtual_tokens": 4}),
    ],
)
def test_tasks_of_rows(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base, task = llama(), torch.tensor([2, 0])
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, name)(task_type="CAUSAL_LM", **options)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=IDS, task_ids=task).logits[:, -4:]
        adapters = ak.Adapters(base)
        adapters.load(tmp_path / "theirs", "a")
        adapters.activate("a")
        with adapters.context(task=task):
            assert close(base(IDS).logits, expected)
        adapters.save("a", tmp_path / "ours", format="peft")
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
        assert torch.equal(again(input_ids=IDS, task_ids=task).logits[:, -4:], expected)


@pytest.mark.parametrize(
    ("kind", "key", "told"),
    [
        ("XLORA", "base_model.internal_xlora_classifier.layers.3.weight", "Gate"),
        ("UNILORA", "base_model.unilora_theta_d", "save_as_lora"),
        ("FROD", "base_model.frod_V.q_proj", "extract"),
        ("ADAMSS", "base_model.model.model.layers.0.self_attn.q_proj.adamss_newB", "extract"),
    ],
)
def test_types_that_are_refused_say_what_would_carry_them(tmp_path: Path, kind: str, key: str, told: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({key: torch.ones(2)}, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(errors.UnsupportedFileError, match=f"{kind}.*{told}"):
        ak.Adapters(llama()).load(tmp_path, "a")


def test_a_cartridge_is_a_prefix(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = llama()
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    adapters = ak.Adapters(base)
    adapters.load(tmp_path, "a")
    adapters.activate("a")
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, attention_mask=mask).logits for model in (base, theirs))
    assert close(found, expected)
