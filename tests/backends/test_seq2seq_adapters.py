"""Every adapter type on encoder-decoder models, and the equations of their blocks and attentions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from tests.backends.transformers_models import (
    adapted,
    build,
    check_file,
    check_generation,
    check_half,
    inputs,
    run,
    tokens,
    watch,
    with_bottlenecks,
)
from tests.backends.vision_checks import check_adapter, check_checkpointing, check_merge, prefixed, soft

NAMES = ("T5", "FlanT5", "T5Encoder", "UMT5", "Bart", "Whisper")
GENERATING = ("T5", "FlanT5", "UMT5", "Bart")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PREFIX = ak.Prefix(length=3, init_std=1.0, targets="*.kv")
TYPES = {
    "lora": ak.LoRA(rank=2, alpha=3.0, targets="*"),
    "bottleneck": ak.Bottleneck(width=5, targets="all"),
    "prefix": PREFIX,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TYPES)
def test_adapters_act_train_and_leave_without_a_trace(name: str, kind: str) -> None:
    check_adapter(build(name), run, TYPES[kind])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_at_every_weight(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check_merge(build(name, dtype=dtype), run, tolerance)


@pytest.mark.parametrize("name", ["FlanT5", "Whisper"])
@pytest.mark.parametrize("kind", TYPES)
def test_half_precision(name: str, kind: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    for path, module in model.named_modules():
        if path.endswith(".wo"):  # transformers loads these of T5 in float32, whatever it is told
            module.float()
    check_half(model, TYPES[kind])


@pytest.mark.parametrize("name", ["FlanT5", "Whisper"])
def test_a_file_gives_back_the_bits(name: str, tmp_path: Path) -> None:
    check_file(name, TYPES["lora"], tmp_path)


@pytest.mark.parametrize("name", ["T5", "Bart"])
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_checkpointing_changes_no_gradient(name: str, kind: str) -> None:
    check_checkpointing(
        build(name), run, lambda model: model.activation_checkpointing_enable({"use_reentrant": False}), TYPES[kind]
    )


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_cached_generation_equals_uncached(name: str, kind: str) -> None:
    model, _ = adapted(name, TYPES[kind])
    mask = torch.ones_like(tokens())
    mask[0, -3:] = 0
    check_generation(model, input_ids=tokens() * mask, attention_mask=mask)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_whisper_writes_with_a_cache_as_without(kind: str) -> None:
    model, _ = adapted("Whisper", TYPES[kind])
    given = inputs(model)
    whole, cache, parts = model(**given).logits, None, []
    for part in given["decoder_input_ids"].split([4, 1, 2], dim=1):
        out = model(
            input_features=given["input_features"], decoder_input_ids=part, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


# --- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["attn", "cross"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_t5_prefix_is_in_the_softmax_and_the_bias_is_on_tokens_alone(role: str, attention: str) -> None:
    model, adapters = adapted("T5", PREFIX, attention=attention)
    key = f"{role}.kv@language.decoder.1"
    point = next(point for point in adapters.points() if point.id == key)
    module: Any = model.get_submodule(point.path)
    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True)
    module.o.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    with torch.no_grad():
        run(model)
    source = seen["x"] if role == "attn" else seen["key_value_states"]
    q, k, v = (
        part(x).unflatten(-1, (2, 6)).transpose(1, 2)
        for part, x in ((module.q, seen["x"]), (module.k, source), (module.v, source))
    )
    bias = torch.zeros(1, 2, 7, source.shape[1], dtype=q.dtype)
    if role == "attn":
        bias = model.decoder.block[0].layer[0].SelfAttention.compute_bias(7, 7)
        bias = bias + torch.full((7, 7), -torch.inf, dtype=q.dtype).triu(1)
    mixed = soft(q, *prefixed(adapters.modules("a")[key], k, v), 1.0, F.pad(bias, (3, 0)))
    torch.testing.assert_close(seen["mixed"], mixed.transpose(1, 2).flatten(2), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_sdpa_agree_on_prefixes_and_padding(name: str) -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        model, _ = adapted(name, PREFIX, attention=attention)
        given = inputs(model)
        masks = {} if name == "Whisper" else {"attention_mask": (torch.arange(9) < torch.tensor([[6], [9]])).long()}
        outputs.append(model(**given, **masks)[0][:, :6])
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)


def test_padding_of_the_source_changes_nothing_for_the_target() -> None:
    model, _ = adapted("FlanT5", PREFIX)
    ids, target = tokens(), tokens(length=7, seed=5)
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    together = model(input_ids=ids * mask, attention_mask=mask, decoder_input_ids=target).logits
    alone = model(input_ids=ids[:1, :6], decoder_input_ids=target[:1]).logits
    torch.testing.assert_close(together[:1], alone, **EXACT)


# --- blocks ----------------------------------------------------------------------------------------------------------


def t5_sublayers(block: Any, args: Any, _: Any) -> list[tuple[Callable[[Tensor], Tensor], nn.Module]]:
    mask, bias, encoded, encoded_mask, encoded_bias = args[1:6]
    first, second, third = block.layer
    return [
        (lambda h: first.SelfAttention(h, mask=mask, position_bias=bias)[0], first.layer_norm),
        (
            lambda h: second.EncDecAttention(
                h, mask=encoded_mask, key_value_states=encoded, position_bias=encoded_bias
            )[0],
            second.layer_norm,
        ),
        (third.DenseReluDense, third.layer_norm),
    ]


def bart_sublayers(block: Any, args: Any, kwargs: Any) -> list[tuple[Callable[[Tensor], Tensor], nn.Module]]:
    return [
        (lambda h: block.self_attn(h, attention_mask=args[1])[0], block.self_attn_layer_norm),
        (
            lambda h: block.encoder_attn(h, args[2], attention_mask=kwargs["encoder_attention_mask"])[0],
            block.encoder_attn_layer_norm,
        ),
        (lambda h: block.fc2(block.activation_fn(block.fc1(h))), block.final_layer_norm),
    ]


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
@pytest.mark.parametrize("name", ["T5", "Bart", "Whisper"])
def test_a_decoder_block_with_bottlenecks_is_their_equation(name: str, form: str) -> None:
    model, adapters = adapted(name, ak.Bottleneck(width=5, targets="attn cross mlp", form=form))
    path = "decoder.block.1" if name == "T5" else "model.decoder.layers.1"
    seen, block = watch(model.get_submodule(path)), build(name).get_submodule(path)
    run(model, use_cache=False)
    parts = (t5_sublayers if name == "T5" else bart_sublayers)(block, seen["args"], seen["kwargs"])
    modules = [adapters.modules("a")[f"{role}@language.decoder.1"] for role in ("attn", "cross", "mlp")]
    sublayers = [(module, *part) for module, part in zip(modules, parts, strict=True)]
    expected = with_bottlenecks(seen["args"][0], sublayers, form, post_norm=name == "Bart")
    torch.testing.assert_close(seen["y"], expected, **EXACT)


# --- weights that are not simply called ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bart", "Whisper"])
@pytest.mark.parametrize("role", ["embed.pos", "embed.tokens"])
def test_lora_on_a_table_is_lora_on_its_rows(name: str, role: str) -> None:
    model, adapters = adapted(name, ak.LoRA(rank=2, alpha=3.0, targets=role))
    reference = build(name)
    tables = {"embed.pos": "embed_positions", "embed.tokens": "embed_tokens"}
    for key, module in adapters.modules("a").items():
        stack = "encoder" if ".encoder" in key else "decoder"
        table = reference.get_submodule(f"model.{stack}.{tables[role]}")
        table.weight = nn.Parameter(table.weight + 1.5 * (module.B @ module.A).T)  # a new one: the old may be tied
    torch.testing.assert_close(run(model), run(reference), **EXACT)
    torch.testing.assert_close(run(model), run_merged(adapters, model), **EXACT)


def run_merged(adapters: ak.Adapters, model: Any) -> Tensor:
    with adapters.merged():
        return run(model)


def test_lora_on_t5_biases_of_positions_is_lora_on_their_table() -> None:
    model, adapters = adapted("T5", ak.LoRA(rank=2, alpha=3.0, targets="embed.pos"))
    reference = build("T5")
    for key, module in adapters.modules("a").items():
        stack = reference.encoder if ".encoder" in key else reference.decoder
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data += 1.5 * (module.B @ module.A).T
    assert len(adapters.modules("a")) == 2
    torch.testing.assert_close(run(model), run(reference), **EXACT)
