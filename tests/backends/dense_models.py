"""Tiny dense language models of the families beyond Llama, GPT-2 and BERT, in every layout that a config can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import adapterkit as ak
from tests.backends.language_models import padded, shake

WIDTH, HEADS, LAYERS, VOCABULARY = 16, 4, 2, 40

_BASE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "hidden_size": WIDTH}
_COMMON = {
    **_BASE,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 5}
_BLOOM = {**_BASE, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": 0.25}
_FALCON = {**_BASE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "initializer_range": 0.25}
_MPT = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, "initializer_range": 0.25}
_OPT = {
    **_BASE,
    "ffn_dim": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "init_std": 0.25,
}
_DEBERTA = {
    **_COMMON,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": False,
    "type_vocab_size": 0,
}
_SPECIAL = {"cls_token_id": 1, "sep_token_id": 1}


@dataclass(frozen=True)
class Variant:
    """One layout: a config, the model class of the tests, and the roles of one of its blocks in model order."""

    config: str
    head: str
    entries: dict[str, Any]
    stem: str
    block: str
    tail: str = "head"

    @property
    def causal(self) -> bool:
        """Whether it generates."""
        return "CausalLM" in self.head


_STEM = "embed.tokens tokens"
_FUSED = "attn.kv attn.q attn.k attn.v attn.o attn mlp.up mlp.down mlp"
_SANDWICH = "attn.kv attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down attn mlp"
_OPT_STEM = "embed.tokens tokens embed.pos"
_OPT_BLOCK = "attn.kv attn.k attn.v attn.q attn.o attn mlp.up mlp.down mlp"
_DEBERTA_BLOCK = "attn.kv attn.q attn.k attn.v attn.pos_k attn.pos_q attn.o attn mlp.up mlp.down mlp"

VARIANTS: dict[str, Variant] = {
    "gemma2": Variant("Gemma2Config", "Gemma2ForCausalLM", _GEMMA, _STEM, _SANDWICH),
    "gemma3": Variant("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA, _STEM, _SANDWICH),
    "phi3": Variant(
        "Phi3Config",
        "Phi3ForCausalLM",
        _GROUPED,
        _STEM,
        "attn.kv attn.o attn.q attn.k attn.v mlp.gate mlp.up mlp.down attn mlp",
    ),
    "neox parallel": Variant(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_COMMON, "use_parallel_residual": True},
        _STEM,
        "attn mlp attn.kv attn.q attn.k attn.v attn.o mlp.up mlp.down",
    ),
    "neox": Variant(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_COMMON, "use_parallel_residual": False},
        _STEM,
        "attn mlp attn.kv attn.q attn.k attn.v attn.o mlp.up mlp.down",
    ),
    "opt": Variant("OPTConfig", "OPTForCausalLM", _OPT, _OPT_STEM, _OPT_BLOCK),
    "opt post-norm": Variant(
        "OPTConfig",
        "OPTForCausalLM",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 12},
        f"{_OPT_STEM} head.proj embed.proj",
        _OPT_BLOCK,
    ),
    "bloom": Variant("BloomConfig", "BloomForCausalLM", _BLOOM, _STEM, _FUSED),
    "bloom normed residual": Variant(
        "BloomConfig",
        "BloomForCausalLM",
        {**_BLOOM, "apply_residual_connection_post_layernorm": True},
        _STEM,
        _FUSED,
    ),
    "bloom sliced": Variant(
        "BloomConfig",
        "BloomForCausalLM",
        {**_BLOOM, "pretraining_tp": 2, "slow_but_exact": True},
        _STEM,
        "attn.kv attn.q attn.k attn.v attn.o mlp.up mlp.down",
    ),
    "falcon multi-query": Variant("FalconConfig", "FalconForCausalLM", _FALCON, _STEM, _FUSED),
    "falcon alibi": Variant(
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        _STEM,
        _FUSED,
    ),
    "falcon grouped": Variant(
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        _STEM,
        _FUSED,
    ),
    "mpt": Variant(
        "MptConfig",
        "MptForCausalLM",
        {**_BASE, **_MPT, "attn_config": {"clip_qkv": 2.0}},
        _STEM,
        "attn.kv attn.q attn.k attn.v attn.o mlp.up mlp.down mlp attn",
    ),
    "roberta": Variant(
        "RobertaConfig",
        "RobertaForMaskedLM",
        _COMMON,
        "embed.tokens embed.type tokens embed.pos",
        _FUSED,
        "head.transform head",
    ),
    "deberta": Variant(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {**_DEBERTA, "conv_kernel_size": 3, "embedding_size": 12},
        "embed.tokens tokens embed.proj",
        _DEBERTA_BLOCK,
        "embed.relative conv head.transform head",
    ),
    "deberta new head": Variant(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {**_DEBERTA, "legacy": False, "share_att_key": True},
        _STEM,
        _DEBERTA_BLOCK.replace(" attn.pos_k attn.pos_q", ""),
        "embed.relative head.transform",
    ),
    "modernbert": Variant(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_COMMON, **_SPECIAL, "local_attention": 4},
        _STEM,
        "attn.kv attn.q attn.k attn.v attn.o attn mlp.gate mlp.up mlp.down mlp",
        "head.transform head",
    ),
}

CAUSAL = [name for name, variant in VARIANTS.items() if variant.causal]


def skeleton(name: str, head: str | None = None) -> Any:
    """A model without weights."""
    variant = VARIANTS[name]
    with torch.device("meta"):
        return getattr(transformers, head or variant.head)(getattr(transformers, variant.config)(**variant.entries))


def build(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A frozen model in evaluation mode with strong weights, the same for the same arguments.

    Args:
        name: A key of `VARIANTS`.
        dtype: Of its parameters.
        **changes: Config entries that differ from the variant's, such as `attn_implementation`.
    """
    variant = VARIANTS[name]
    config = getattr(transformers, variant.config)(**{**variant.entries, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, variant.head)(config)
        for parameter in model.parameters():  # biases start at zero and gains at one: neither would show a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False).to(dtype).eval()


def adapted(name: str, config: ak.AdapterConfig, *, scale: float = 0.3, **options: Any) -> tuple[Any, ak.Adapters]:
    """A model (see `build`) with one adapter, called "a", that has an effect."""
    model = build(name, **options)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    shake(adapters, scale=scale)
    return model, adapters


def padded_inputs(name: str, side: str) -> dict[str, Tensor]:
    """A batch of two, one padded. Positions only for the families that do not find them in the mask."""
    inputs = padded(side)
    takes_positions = name.startswith(("gemma", "phi3", "neox", "falcon multi", "falcon grouped", "modernbert"))
    return inputs if takes_positions else {k: v for k, v in inputs.items() if k != "position_ids"}
