"""PEFT's `ensure_weight_tying`: one pair of factors for an embedding and the head that is tied to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import CheckpointError
from adapterkit.torchvision_ops import ensure_torchvision_ops
from tests.adapters.test_tied import IDS, built, weights
from tests.values import randomize

ensure_torchvision_ops()
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file", "ignore:Found missing adapter keys", "ignore:.is_gradient_checkpointing"
)


def written_by_peft(model: Any, folder: Path) -> torch.Tensor:
    """An adapter of PEFT with random values; the logits with it."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, ensure_weight_tying=True)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "lm_head" not in name:  # the head's are the embedding's, transposed
                parameter.normal_(0, 0.3)
        y = wrapped(IDS).logits
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return y


@torch.no_grad()
def test_what_peft_has_tied_is_tied(tmp_path: Path) -> None:
    y = written_by_peft(built("Llama"), tmp_path)
    model = built("Llama")
    adapters = ak.Adapters(model)
    report = adapters.load(tmp_path, "a")
    assert report.type == "lora + tied" or report.type == "tied + lora"
    adapters.activate("a")
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)
    with adapters.merged():
        one, other = weights(model)
        assert one is other
        torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-4)
    native = adapters.save("a", tmp_path / "native.safetensors")
    again = ak.Adapters(other_model := built("Llama"))
    again.load(native, "a")
    again.activate("a")
    torch.testing.assert_close(other_model(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_where_the_base_is_untied_each_layer_has_its_own(tmp_path: Path) -> None:
    written_by_peft(built("Llama"), tmp_path)
    adapters = ak.Adapters(built("Llama", tie_word_embeddings=False))
    assert adapters.load(tmp_path, "a").type == "lora"


@torch.no_grad()
def test_peft_reads_what_is_tied_here(tmp_path: Path) -> None:
    model = built("Llama")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Union((ak.LoRA("attn.q", rank=2, alpha=3.0), ak.Tied(ak.LoRA(rank=2, alpha=3.0)))))
    randomize(adapters, "a")
    y = model(IDS).logits
    adapters.save("a", tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    wrapped = peft.PeftModel.from_pretrained(built("Llama"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(wrapped(IDS).logits, y, rtol=1e-4, atol=1e-4)
    head, embedding = wrapped.base_model.model.lm_head, wrapped.base_model.model.model.embed_tokens
    assert head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
    again = ak.Adapters(other := built("Llama"))
    again.load(tmp_path / "a", "b")
    again.activate("b")
    torch.testing.assert_close(other(IDS).logits, y, rtol=1e-4, atol=1e-4)
    assert len({id(one.shared) for key, one in again.modules("b").items() if "attn" not in key}) == 1  # type: ignore[attr-defined]


@torch.no_grad()
def test_peft_reads_rows_that_are_tied_here(tmp_path: Path) -> None:
    model = built("Llama")
    adapters = ak.Adapters(model)
    adapters.add("a", ak.Tied(ak.Trainable(rows=(3, 7))))
    randomize(adapters, "a")
    y = model(IDS).logits
    adapters.save("a", tmp_path / "a", format="peft")
    wrapped = peft.PeftModel.from_pretrained(built("Llama"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(wrapped(IDS).logits, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_factors_that_differ_are_told(tmp_path: Path) -> None:
    written_by_peft(built("Llama"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lm_head" in key)
    save_file({**tensors, key: tensors[key] + 1}, path)
    with pytest.raises(CheckpointError, match="its config says that they are tied"):
        ak.Adapters(built("Llama")).load(tmp_path, "a")


def test_what_peft_cannot_tie_is_refused(tmp_path: Path) -> None:
    adapters = ak.Adapters(built("Llama"))
    adapters.add("a", ak.Tied(ak.DoRA(rank=2)))
    with pytest.raises(CheckpointError, match="PEFT has no dora of a tied weight as one; native holds it"):
        adapters.save("a", tmp_path / "a", format="peft")
