"""Embedding files: diffusers draws from them what the run drew, and they come back as the adapter that they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapterkit_textual_inversion.embeddings import stem_of
from adapterkit_textual_inversion.inversion import TextualInversion
from adapterkit_textual_inversion.tokens import add_tokens
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import CheckpointError, MissingKeysError
from adapterkit.training.loop import train

from .test_training import STYLE, WORD, _registered, folder, make_run  # noqa: F401 - fixtures

PROMPT = "one <ink>"


def drawn(pipe: Any, prompt: str = PROMPT) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(42)
    return np.asarray(pipe(prompt, height=16, width=16, num_inference_steps=2, generator=generator).images[0], int)


def sample(run: Path, step: int = 4) -> np.ndarray[Any, Any]:
    with Image.open(run / f"samples/step_{step:06d}_p0_s42.png") as picture:
        return np.asarray(picture, dtype=int)


def pipeline(folder: Path, model: str) -> Any:  # noqa: F811
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder / model)


def test_diffusers_draws_from_the_file_of_a_word_what_the_run_drew(folder: Path, tmp_path: Path):  # noqa: F811
    result = train(make_run(folder, tmp_path / "run", WORD, learning_rate=0.3), silent=True)
    assert [key for key in result.figures if key.startswith("for ")] == ["for embeddings"]
    file = tmp_path / "run/export/embeddings/ink.safetensors"
    assert {key: value.shape for key, value in load_file(file).items()} == {"<ink>": (2, 12)}
    pipe = pipeline(folder, "model")
    pipe.load_textual_inversion(str(file))
    found, wanted = drawn(pipe), sample(tmp_path / "run")
    assert np.abs(found - wanted).max() <= 1
    assert np.abs(sample(tmp_path / "run", 0) - wanted).max() > 1
    card = (tmp_path / "run/README.md").read_text()
    assert 'glob("*.safetensors"): pipe.load_textual_inversion(str(file))' in card
    assert "diffusers" in card
    assert "agrees (0.0% of the effect apart)" in card


def test_pivotal_tuning_leaves_a_file_of_the_style_and_one_of_the_word(folder: Path, tmp_path: Path):  # noqa: F811
    parts = [{"type": one["type"], "config": {k: v for k, v in one.items() if k != "type"}} for one in (WORD, STYLE)]
    run = make_run(folder, tmp_path / "run", {"type": "union", "parts": parts}, "model_xl", learning_rate=0.1)
    result = train(run, silent=True)
    exported = {key: value for key, value in result.figures.items() if key.startswith("for ")}
    assert set(exported) == {"for kohya", "for diffusers", "for embeddings"}
    assert not any("DIFFERS" in value or "CANNOT" in value for value in exported.values())
    file = tmp_path / "run/export/embeddings/ink.safetensors"
    tensors = load_file(file)
    assert {key: value.shape for key, value in tensors.items()} == {"clip_l": (2, 6), "clip_g": (2, 6)}
    pipe = pipeline(folder, "model_xl")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        own = {name: getattr(pipe, f"{name}{suffix}") for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(tensors[key], token="<ink>", **own)
    pipe.load_lora_weights(str(tmp_path / "run/export/diffusers"), weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(drawn(pipe) - sample(tmp_path / "run")).max() <= 1


@pytest.mark.parametrize("model", ["model", "model_xl"])
def test_what_is_written_is_read(folder: Path, tmp_path: Path, model: str):  # noqa: F811
    pipe = pipeline(folder, model)
    adapters = ak.Adapters(pipe)
    adapters.add("words", TextualInversion(tokens=("<ink>", "<pen>"), vectors=2))
    for parameter in adapters.parameters("words"):
        torch.nn.init.normal_(parameter)
    values = {key: module.values.detach().clone() for key, module in adapters.modules("words").items()}
    with pytest.raises(CheckpointError, match="holds one string, and there are 2; make a folder"):
        adapters.save("words", tmp_path / "a.safetensors", format="embeddings")
    (tmp_path / "words").mkdir()
    adapters.save("words", tmp_path / "words", format="embeddings")
    assert {file.name for file in (tmp_path / "words").iterdir()} == {"ink.safetensors", "pen.safetensors"}
    other = ak.Adapters(pipeline(folder, model))
    other.load(tmp_path / "words", "words")
    config: Any = other.config("words")
    assert (config.tokens, config.vectors) == (("<ink>", "<pen>"), 2)
    for key, module in other.modules("words").items():
        assert torch.equal(module.values, values[key])
    one = ak.Adapters(pipeline(folder, model))
    one.load(tmp_path / "words/pen.safetensors", "pen")
    for key, module in one.modules("pen").items():
        assert torch.equal(module.values, values[key][2:])
    ids = add_tokens(one, "pen", pipeline(folder, model).tokenizer, component="text_encoder")
    assert [*ids] == ["<pen>", "<pen>#1"]


def test_files_of_others_are_read(folder: Path, tmp_path: Path):  # noqa: F811
    """As kohya's scripts, diffusers, and A1111 write them."""
    vectors = torch.randn(2, 12)
    save_file({"emb_params": vectors}, tmp_path / "style.safetensors")
    save_file({"<cat>": vectors[0].contiguous()}, tmp_path / "learned_embeds.safetensors")
    old = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": vectors}, "name": "old", "step": 3}
    torch.save(old, tmp_path / "x.pt")
    adapters = ak.Adapters(pipeline(folder, "model"))
    for name, file, token in (("a", "style.safetensors", "style"), ("b", "learned_embeds.safetensors", "<cat>")):
        adapters.load(tmp_path / file, name)
        config: Any = adapters.config(name)
        assert config.tokens == (token,)
    adapters.load(tmp_path / "x.pt", "c", allow_pickle=True)
    config = adapters.config("c")
    assert config.tokens == ("old",)
    [module] = adapters.modules("c").values()
    assert torch.equal(module.values, vectors)
    save_file({"clip_l": torch.randn(1, 768), "clip_g": torch.randn(1, 1280)}, tmp_path / "xl.safetensors")
    with pytest.raises(MissingKeysError, match="nothing in it fits the model"):
        adapters.load(tmp_path / "xl.safetensors", "d")
    with safe_open(tmp_path / "style.safetensors", "pt") as file:
        assert [*file.keys()] == ["emb_params"]


def test_what_no_embedding_file_says_is_an_error(folder: Path, tmp_path: Path):  # noqa: F811
    adapters = ak.Adapters(pipeline(folder, "model"))
    adapters.add("lora", ak.LoRA(targets="attn.q@component=text_encoder"))
    with pytest.raises(CheckpointError, match="hold new tokens alone, and no lora; native holds any"):
        adapters.save("lora", tmp_path / "a.safetensors", format="embeddings")
    adapters.add("alike", TextualInversion(tokens=("<a>", "(a)")))
    (tmp_path / "words").mkdir()
    with pytest.raises(CheckpointError, match="differ in marks alone"):
        adapters.save("alike", tmp_path / "words", format="embeddings")
    assert [stem_of(token) for token in ("<my cat>", "<>", "ünï.1")] == ["my_cat", "embedding", "ünï.1"]
