"""Files that were baked hold what a merge in memory gives, bit for bit, in the base's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import adapterkit as ak
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import CheckpointError, ConfigError, ModelNotFoundError, NotMergeableError, UnsupportedModelError
from adapterkit.tools.bake import bake
from adapterkit.tools.base import open_base
from tests.backends.vision_models import pipeline

ADAPTER = ak.LoRA(rank=2, alpha=3, targets="attn.{q,v} mlp.down")


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, num_key_value_heads=1, tie_word_embeddings=False, **sizes, **options)
    return AutoModelForCausalLM.from_config(config)


def adapted(model: Any, config: ak.AdapterConfig) -> tuple[Checkpoint, ak.Adapters]:
    """A random adapter, and a handle on the model with it."""
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapters.checkpoint("a"), adapters


def merged(folder: Path, config: ak.AdapterConfig, weight: float = 1.0) -> tuple[Checkpoint, Any]:
    """An adapter, and the model of the folder with the adapter in its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    checkpoint, adapters = adapted(model, config)
    adapters.activate({"a": weight})
    adapters.bake({"a": weight})
    return checkpoint, model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder).parent}/{key}": value for key, value in load_file(path).items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "8KB"])
def test_a_folder_of_transformers(tmp_path: Path, dtype: torch.dtype, size: str):
    llama().to(dtype).save_pretrained(tmp_path / "base", max_shard_size=size)
    checkpoint, model = merged(tmp_path / "base", ADAPTER, 0.5)
    found = bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out", weight=0.5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    was = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == was
    changed = {
        name for name in was if (tmp_path / "out" / name).read_bytes() != (tmp_path / "base" / name).read_bytes()
    }
    assert changed == {*found.files}
    assert (len(was) > 4) == (size == "8KB")
    assert found.tensors == 6


def test_fused_layers_with_biases(tmp_path: Path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    both = ak.Union((ak.LoRA(rank=2, targets="attn.q attn.v"), ak.Trainable("attn.v", part="bias")))
    checkpoint, model = merged(tmp_path / "base", both)
    bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(NotMergeableError, match="are one weight in the files"):
        bake(open_base(str(tmp_path / "base")), tmp_path / "base", _of(model, "head"), tmp_path / "again")


def _of(model: nn.Module, targets: str) -> Checkpoint:
    adapters = ak.Adapters(model)
    adapters.add("b", ak.LoRA(rank=2, targets=targets))
    return adapters.checkpoint("b")


def test_what_depends_on_the_weight(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    checkpoint, model = merged(tmp_path / "base", ak.DoRA(rank=2, targets="attn.q"))
    bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_a_pipeline_is_copied_but_for_what_changes(tmp_path: Path):
    (tmp_path / "words").mkdir()
    torch.manual_seed(0)
    pipe = pipeline(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "base")
    save_file({"x": torch.ones(1)}, tmp_path / "base/unet/diffusion_pytorch_model.fp16.safetensors")
    checkpoint, adapters = adapted(pipe, ak.LoRA(rank=2, targets="attn.q res.conv1@component=unet"))
    found = bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out")
    adapters.bake("a")
    again = type(pipe).from_pretrained(tmp_path / "out")
    for part in ("unet", "text_encoder", "vae"):
        pairs = zip(getattr(pipe, part).state_dict().items(), getattr(again, part).state_dict().items(), strict=True)
        for (name, one), (_, other) in pairs:
            assert torch.equal(one, other), name
    assert {Path(name).parent.name for name in found.files} == {"unet", "text_encoder"}
    assert found.left_out == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert not (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").exists()


def test_files_that_call_the_parameters_by_longer_or_shorter_names(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    checkpoint, model = merged(tmp_path / "base", ADAPTER)
    file = tmp_path / "base/model.safetensors"
    own = {f"wrapped.{key}": value for key, value in load_file(file).items()}
    save_file(own, file, {"format": "pt", "modelspec.hash_sha256": "0xabc", "modelspec.title": "base"})
    bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(found[f"wrapped.{name}"], value)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "modelspec.title": "base"}


def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    llama().save_pretrained(tmp_path / "base")
    checkpoint, _ = merged(tmp_path / "base", ADAPTER)
    from adapterkit.formats import container

    read: list[int] = []
    of_old = container.read_tensors
    monkeypatch.setattr(
        container,
        "read_tensors",
        lambda path, header, names, limit: read.append(len(names)) or of_old(path, header, names, limit),
    )
    bake(open_base(str(tmp_path / "base")), tmp_path / "base", checkpoint, tmp_path / "out")
    assert {*read} == {1}
    assert len(read) == len(load_file(tmp_path / "base/model.safetensors")) + 6


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_target_that_exists_and_a_weight_that_is_none(base: Path, tmp_path: Path):
    checkpoint, _ = merged(base, ADAPTER)
    with pytest.raises(CheckpointError, match="exists already"):
        bake(open_base(str(base)), base, checkpoint, base)
    with pytest.raises(CheckpointError, match="does not exist"):
        bake(open_base(str(base)), base, checkpoint, tmp_path / "no/out")
    with pytest.raises(ConfigError, match="weight must be a number"):
        bake(open_base(str(base)), base, checkpoint, tmp_path / "out", weight=float("inf"))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ak.Bottleneck(width=2, targets="mlp"), "acts otherwise than by another weight"),
        (ak.Trainable("attn.q", part="bias"), "has no bias"),
    ],
)
def test_what_no_file_of_the_base_could_hold(base: Path, tmp_path: Path, config: ak.AdapterConfig, told: str):
    model = AutoModelForCausalLM.from_pretrained(base)
    if isinstance(config, ak.Trainable):
        checkpoint, _ = adapted(llama(attention_bias=True), config)
    else:
        checkpoint, _ = adapted(model, config)
    with pytest.raises((NotMergeableError, CheckpointError), match=told):
        bake(open_base(str(base)), base, checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_weights_that_are_not_there(base: Path, tmp_path: Path):
    checkpoint, _ = merged(base, ADAPTER)
    file = base / "model.safetensors"
    own = load_file(file)
    save_file({key: value for key, value in own.items() if "layers.1.mlp.down" not in key}, file)
    with pytest.raises(ModelNotFoundError, match=r"holds no tensor for model\.layers\.1\.mlp\.down_proj\.weight"):
        bake(open_base(str(base)), base, checkpoint, tmp_path / "out")
    file.unlink()
    with pytest.raises(ModelNotFoundError, match="holds no weights in safetensors files"):
        open_base(str(base))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b"}}))
    with pytest.raises(ModelNotFoundError, match="does not say which files"):
        open_base(str(base))


def test_a_value_beyond_the_dtype_leaves_nothing_behind(base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.half().save_pretrained(tmp_path / "half")
    checkpoint, _ = merged(tmp_path / "half", ADAPTER)
    large = {key: {name: tensor * 1e4 for name, tensor in own.items()} for key, own in checkpoint.tensors.items()}
    with pytest.raises(NotMergeableError, match=r"torch\.float16 ends at"):
        bake(open_base(str(tmp_path / "half")), tmp_path / "half", checkpoint.replace(tensors=large), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "half"}


def test_what_is_made_of_a_read_only_folder_can_be_changed(base: Path, tmp_path: Path):
    (base / "more").mkdir()
    (base / "more" / "notes.md").write_text("...")
    for path in (base / "more" / "notes.md", base / "more", base):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        checkpoint, _ = adapted(llama(), ADAPTER)
        bake(open_base(str(base)), base, checkpoint, tmp_path / "out")
    finally:
        for path in (base, base / "more"):
            path.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")])


def test_a_part_of_a_pipeline_alone(tmp_path: Path):
    (tmp_path / "words").mkdir()
    unet = pipeline(tmp_path / "words").unet
    unet.save_pretrained(tmp_path / "unet")
    checkpoint, adapters = adapted(unet, ak.LoRA(rank=2, targets="cross.{q,k}"))
    bake(open_base(str(tmp_path / "unet")), tmp_path / "unet", checkpoint, tmp_path / "out")
    adapters.bake()
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in unet.state_dict().items())


def test_a_part_of_a_pipeline_that_is_no_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(UnsupportedModelError, match="holds a 'DDIMScheduler', which is no model of diffusers"):
        open_base(str(tmp_path))
