"""Tiny language models of every family, built from configs with strong weights, so that differences show."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

import adapterkit as ak
from adapterkit.points import InjectionPoint

VOCABULARY, WIDTH, LAYERS = 40, 32, 2

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.25, **_SPECIAL}
_LLAMA = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = {
    **_COMMON,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_BERT = {
    **_COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# Config class and its arguments, by layout. Between them: grouped queries, a head width that is not width / heads,
# sliding windows, projections with and without bias, norms of queries and keys, tied weights.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**_LLAMA, "head_dim": 12}),
    "Mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "Qwen2": ("Qwen2Config", {**_LLAMA}),
    "Qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "GPT2": ("GPT2Config", _GPT2),
    "Bert": ("BertConfig", _BERT),
}

CAUSAL = {name: f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")} | {"GPT2": "GPT2LMHeadModel"}
EVERY = {**CAUSAL, "Bert": "BertModel"}
"""Layout -> the class that the tests of behaviour use. MiniLM is a BertModel."""


def build(
    layout: str, head: str | None = None, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """A model in evaluation mode, the same for the same arguments.

    Args:
        layout: A key of `CONFIGS`.
        head: The model class; by default the one of `EVERY`.
        attention: transformers' attention implementation.
        dtype: Of its parameters.
        **changes: Config entries that differ from `CONFIGS`.
    """
    config_class, entries = CONFIGS[layout]
    config = getattr(transformers, config_class)(**{**entries, "attn_implementation": attention, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, head or EVERY[layout])(config)
        for parameter in model.parameters():  # biases start at zero and gains at one: neither would show a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def skeleton(layout: str, head: str, **changes: Any) -> nn.Module:
    """A model without weights."""
    config_class, entries = CONFIGS[layout]
    with torch.device("meta"):
        return getattr(transformers, head)(getattr(transformers, config_class)(**{**entries, **changes}))


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    """Indices that never are the padding's."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def padded(side: str, short: int = 3) -> dict[str, Tensor]:
    """Two sequences, the first with `short` positions of padding, with the positions that each token truly has."""
    ids = tokens()
    mask = torch.ones_like(ids)
    (mask[0, :short] if side == "left" else mask[0, -short:]).zero_()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def output(model: Callable[..., ModelOutput], ids: Tensor | None = None, **inputs: Any) -> Tensor:
    """Logits or hidden states [batch, length, features]."""
    inputs = inputs if ids is None else {"input_ids": ids, **inputs}
    result: Any = model(**inputs)
    return result[0]


def unmapped(model: nn.Module, points: Iterable[InjectionPoint], ignored: Mapping[str, str]) -> list[str]:
    """Paths of the modules that own parameters, are at no point and match no ignored glob."""
    mapped = {point.path for point in points}
    owners = [name for name, module in model.named_modules() if module._parameters]
    return [
        name for name in owners if name not in mapped and not any(fnmatch.fnmatchcase(name, glob) for glob in ignored)
    ]


def shake(adapters: ak.Adapters, name: str = "a", scale: float = 0.3) -> None:
    """Random parameters everywhere: at its initial values an adapter has no effect to see."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.parameters(name):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def adapted(layout: str, config: ak.AdapterConfig, **options: Any) -> tuple[Any, ak.Adapters]:
    """A model (see `build`) with one adapter, called "a", that has an effect."""
    model = build(layout, **options)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    shake(adapters)
    return model, adapters
