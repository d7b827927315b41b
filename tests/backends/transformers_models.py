"""Tiny models of transformers that are no plain decoders: encoder-decoders, state spaces, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import InjectionPoint, WeightLayout
from tests.backends.vision_checks import randomise

VOCABULARY, WIDTH = 40, 16

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
_HALVES = {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
}
_STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_T5 = {
    **_SPECIAL,
    "d_model": WIDTH,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
_DECODER = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "hidden_size": WIDTH,
    "intermediate_size": 24,  # a multiple of 8, as the kernels for half precision want it
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.25,
}

# Model class, config class and its arguments. Between them: heads whose width is not width / heads, tied and scaled
# embeddings, gated and plain feed-forwards, dense layers among mixtures, sliding and chunked attention, shared experts.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "tie_word_embeddings": True}),
    "FlanT5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "MT5Encoder": ("MT5EncoderModel", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "T5Encoder": ("T5EncoderModel", "T5Config", _T5),
    "UMT5": ("UMT5ForConditionalGeneration", "UMT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "Bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_SPECIAL,
            **_HALVES,
            **_STILL,
            "forced_eos_token_id": None,
            "d_model": WIDTH,
            "max_position_embeddings": 32,
            "scale_embedding": True,
            "init_std": 0.25,
        },
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SPECIAL,
            **_HALVES,
            **_STILL,
            "d_model": WIDTH,
            "num_mel_bins": 5,
            "max_source_positions": 8,
            "max_target_positions": 20,
            "init_std": 0.25,
        },
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            **_SPECIAL,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 3,
            "time_step_rank": 2,
            "residual_in_fp32": False,
        },
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 3, "sliding_window": 5},
    ),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "num_experts": 3,
            "moe_intermediate_size": 24,
            "head_dim": 6,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 7,
            "kv_lora_rank": 6,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 3,
            "v_head_dim": 5,
        },
    ),
    "GptOss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_DECODER, "num_local_experts": 3, "head_dim": 6, "sliding_window": 5},
    ),
    "Llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER,
            "num_local_experts": 3,
            "head_dim": 6,
            "intermediate_size_mlp": 20,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 5,
        },
    ),
}


def build(
    name: str,
    head: str | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    experts: str | None = None,
    **changes: Any,
) -> Any:
    """A frozen model in evaluation mode, the same for the same arguments.

    Args:
        name: A key of `CONFIGS`.
        head: The model class; by default that of `CONFIGS`.
        dtype: Of its parameters.
        attention: transformers' attention implementation; by default the model's own choice.
        experts: transformers' implementation of experts; by default the model's own choice, which has no float64.
        **changes: Config entries that differ from `CONFIGS`.
    """
    config = _config(name, **changes)
    config._attn_implementation = attention
    config._experts_implementation = experts or ("eager" if dtype == torch.float64 else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, head or CONFIGS[name][0])(config)
        for parameter in model.parameters():  # biases start at zero, gains at one, routers at zero
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


def skeleton(name: str, head: str | None = None, **changes: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return getattr(transformers, head or CONFIGS[name][0])(_config(name, **changes))


def _config(name: str, **changes: Any) -> Any:
    _, config_class, entries = CONFIGS[name]
    return getattr(transformers, config_class)(**{"vocab_size": VOCABULARY, **entries, **changes})


def tokens(batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """Indices that never are the padding's."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(model: Any) -> dict[str, Any]:
    """What the model's forward takes, without masks."""
    if model.main_input_name == "input_features":
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        return {"input_features": sound.to(model.dtype), "decoder_input_ids": tokens(length=7)}
    decoder = {"decoder_input_ids": tokens(length=7, seed=5)} if model.can_generate() else {}
    return {"input_ids": tokens(), **(decoder if model.config.is_encoder_decoder else {})}


def run(model: Any, **changes: Any) -> Tensor:
    """Logits or hidden states [batch, length, features]."""
    return model(**{**inputs(model), **changes})[0]


def roles(points: Iterable[InjectionPoint]) -> dict[str, str]:
    """Site -> the roles there, in model order."""
    found: dict[str, list[str]] = {}
    for point in points:
        found.setdefault(point.site, []).append(point.role)
    return {site: " ".join(at) for site, at in found.items()}


def unmapped(model: nn.Module, points: Iterable[InjectionPoint], ignored: Mapping[str, str]) -> list[str]:
    """Parameters that are in no weight point, and that no ignored glob names, nor the module that owns them."""
    mapped = set()
    for point in points:
        if isinstance(point.layout, WeightLayout):
            mapped |= {f"{point.path}.{name}" for name in (point.layout.parameter, point.layout.bias_parameter)}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in mapped]
    return [
        name
        for name in names
        if not any(fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob) for glob in ignored)
    ]


def adapted(name: str, config: ak.AdapterConfig, **options: Any) -> tuple[Any, ak.Adapters]:
    """A model (see `build`) with one adapter, called "a", that has an effect."""
    model = build(name, **options)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomise(adapters)
    return model, adapters


def check_file(name: str, config: ak.AdapterConfig, folder: Path) -> None:
    """Saved, and loaded into a fresh model, an adapter gives the very bits."""
    model, adapters = adapted(name, config)
    adapters.save("a", folder / "a.safetensors")
    other = build(name)
    loaded = ak.Adapters(other)
    loaded.load(folder / "a.safetensors", "b")
    loaded.activate("b")
    with torch.no_grad():  # torch may take another kernel where a gradient is wanted
        assert torch.equal(run(other), run(model))
        assert not torch.equal(run(other), run(build(name)))


def check_half(model: Any, config: ak.AdapterConfig) -> None:
    """In bfloat16 the output keeps its dtype, and the adapter's own parameters, in float32, get finite gradients."""
    base = run(model)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    randomise(adapters)
    output = run(model)
    assert output.dtype == base.dtype
    assert not torch.equal(output, base)
    output.float().sum().backward()
    for parameter in adapters.parameters("a"):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def check_generation(model: Any, **given: Tensor) -> None:
    """Greedy tokens, and the logits that chose them, are those of a generation that keeps no cache."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(**given, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-6, atol=1e-6)


def bottleneck(module: Any, h: Tensor) -> Tensor:
    """The network of a Bottleneck module."""
    return F.linear(torch.relu(F.linear(h, module.down.weight, module.down.bias)), module.up.weight, module.up.bias)


def watch(block: nn.Module) -> dict[str, Any]:
    """What the block is given and what it returns, once it has run."""
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        seen.update(args=args, kwargs=kwargs, y=result[0] if isinstance(result, tuple) else result)

    block.register_forward_hook(keep, with_kwargs=True)
    return seen


def with_bottlenecks(
    x: Tensor, sublayers: Iterable[tuple[Any, Callable[[Tensor], Tensor], nn.Module]], form: str, *, post_norm: bool
) -> Tensor:
    """A block by the published equations: for each sublayer its Bottleneck module, itself without norm, its norm."""
    for module, sublayer, norm in sublayers:
        norm_in, norm_out = (nn.Identity(), norm) if post_norm else (norm, nn.Identity())
        s = sublayer(norm_in(x))
        h = {"pfeiffer": norm_out(s + x), "houlsby": s, "parallel": x, "parallel_norm": norm_in(x)}[form]
        x = norm_out(s + bottleneck(module, h) + x)
    return x
