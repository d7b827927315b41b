"""Mixtures of experts: where their points are, and LoRA on single experts in every orientation of their stacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.experts import DEEPSEEK, MIXTRAL, QWEN3, ExpertsBackend
from adapterkit.engine.read_weights import StackedWeight
from adapterkit.errors import IncompatibleTargetError, TargetNotFoundError, UnsupportedModelError
from adapterkit.mapping.family import resolve
from adapterkit.points import AttentionLayout, Span, WeightLayout
from tests.backends.own import own
from tests.backends.transformers_models import (
    CONFIGS,
    adapted,
    build,
    check_file,
    check_generation,
    check_half,
    roles,
    run,
    skeleton,
    tokens,
    unmapped,
    watch,
    with_bottlenecks,
)
from tests.backends.vision_checks import check_adapter, check_checkpointing, check_merge

NAMES = ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Llama4")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TYPES = {
    "lora": ak.LoRA(rank=2, alpha=3.0, targets="*"),
    "bottleneck": ak.Bottleneck(width=5, targets="all"),
    "prefix": ak.Prefix(length=3, init_std=1.0),
}
EVERY = [(name, kind) for name in NAMES for kind in TYPES]

STEM = "embed.tokens tokens"
ATTENTION = "attn.kv attn.q attn.k attn.v attn.o attn"
LATENT = "attn.kv attn.q_a attn.q_b attn.kv_a attn.kv_b attn.o attn"
DENSE, SHARED = "mlp.gate mlp.up mlp.down", "moe.shared.gate moe.shared.up moe.shared.down"
SNAPSHOTS = {
    "Mixtral": (3, {"0": f"{ATTENTION} mlp moe.router", "1": f"{ATTENTION} mlp moe.router"}),
    "Qwen3Moe": (3, {"0": f"{ATTENTION} mlp {DENSE}", "1": f"{ATTENTION} mlp moe.router"}),
    "DeepseekV3": (4, {"0": f"{LATENT} mlp {DENSE}", "1": f"{LATENT} mlp moe.router {SHARED}"}),
    "GptOss": (3, {"0": f"{ATTENTION} mlp moe.router", "1": f"{ATTENTION} mlp moe.router"}),
    "Llama4": (3, {"0": f"{ATTENTION} mlp {DENSE}", "1": f"{ATTENTION} mlp moe.router {SHARED}"}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_head", [True, False])
def test_the_points_are_these(name: str, with_head: bool) -> None:
    head = CONFIGS[name][0]
    base = "Llama4TextModel" if name == "Llama4" else head.replace("ForCausalLM", "Model")
    model = skeleton(name, head if with_head else base)
    points = own(ExpertsBackend().points(model, "language"))
    count, blocks = SNAPSHOTS[name]
    mixtures = [layer for layer, at in blocks.items() if "moe.router" in at]
    experts = {f"{layer}.{i}": "moe.gate moe.up moe.down" for layer in mixtures for i in range(count)}
    assert roles(points) == {"": f"{STEM} head" if with_head else STEM, **blocks, **experts}
    assert unmapped(model, points, ExpertsBackend.ignored) == []
    assert len({point.id for point in points}) == len(points)
    assert own(ak.points(model)).ids == [point.id for point in points]
    for point in points:
        assert point.tags.get("expert") == (int(point.site.split(".")[1]) if "." in point.site else None)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads_are_heads(head: str) -> None:
    points = own(ak.points(skeleton("Mixtral", f"MixtralFor{head}")))
    assert [point.id for point in points if point.role == "head"] == ["head@language"]
    assert points.ids[:-1] == own(ak.points(skeleton("Mixtral", "MixtralModel"))).ids


def test_an_expert_is_a_tag_and_a_part_of_the_id() -> None:
    points = ak.points(skeleton("Mixtral"), "moe.{up,down}@layer=1,expert>=1")
    assert points.ids == [f"moe.{role}@language.1.{expert}" for role in ("up", "down") for expert in (1, 2)]
    assert {point.path for point in points} == {"model.layers.1.mlp.experts"}
    assert [point.layout.index for point in points] == [1, 2, 1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "form", "bias", "gate", "up"),
    [
        ("Mixtral", "linear", "", Span(0, 24), Span(24, 24)),
        ("Qwen3Moe", "linear", "", Span(0, 24), Span(24, 24)),
        ("DeepseekV3", "linear", "", Span(0, 24), Span(24, 24)),
        ("GptOss", "linear_t", "gate_up_proj_bias", Span(0, 1, count=24, step=2), Span(1, 1, count=24, step=2)),
        ("Llama4", "linear_t", "", Span(0, 24), Span(24, 24)),
    ],
)
def test_gate_and_up_are_spans_of_one_parameter(name: str, form: Any, bias: str, gate: Span, up: Span) -> None:
    points = ak.points(skeleton(name), "moe.{gate,up}@layer=1,expert=0")
    layout = WeightLayout(form, bias=bool(bias), access="read", parameter="gate_up_proj", bias_parameter=bias, index=0)
    assert [(p.role, p.layout, p.span, p.shape) for p in points] == [
        ("moe.gate", layout, gate, (24, 16)),
        ("moe.up", layout, up, (24, 16)),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_attention_points_tell_heads_and_their_width(name: str) -> None:
    layout = {"Mixtral": AttentionLayout(2, 4), "DeepseekV3": AttentionLayout(4, 7, 5)}.get(name, AttentionLayout(2, 6))
    assert {p.layout for p in ak.points(skeleton(name), "attn.kv")} == {layout}


def test_latent_attention_has_a_width_of_values_only_where_it_is_another() -> None:
    (point, _) = ak.points(skeleton("DeepseekV3"), "attn.kv")
    assert (point.in_features, point.out_features) == (4 * 7, 4 * 5)
    (point, _) = ak.points(skeleton("DeepseekV3", v_head_dim=7), "attn.kv")
    assert point.layout == AttentionLayout(4, 7)


def test_presets_leave_the_choice_of_experts_alone() -> None:
    for name in NAMES:
        roles_of = {point.role for point in ak.points(skeleton(name), "linear")}
        assert roles_of & {"moe.router", "moe.gate", "moe.up", "moe.down"} == {"moe.gate", "moe.up", "moe.down"}
        assert [point.site for point in ak.points(skeleton(name), "moe.router@layer=1")] == ["1"]


def test_deepseek_without_a_low_rank_query_has_a_plain_one() -> None:
    points = ak.points(skeleton("DeepseekV3", q_lora_rank=None), "attn.*@layer=0")
    assert [point.role for point in points] == ["attn.kv", "attn.q", "attn.kv_a", "attn.kv_b", "attn.o"]


def test_what_is_not_offered_is_an_error_that_says_what_is() -> None:
    with pytest.raises(TargetNotFoundError, match=r"the role exists, but not with those tags.*layer is one of 0"):
        ak.Adapters(build("Llama4")).add("a", ak.LoRA(targets="mlp.up@layer=1"))
    with pytest.raises(IncompatibleTargetError, match=r"moe\.gate@language\.0\.0.*dropout cannot reach"):
        ak.Adapters(build("Mixtral")).add("a", ak.LoRA(dropout=0.1, targets="linear"))
    with pytest.raises(UnsupportedModelError, match=r"experts backend.*Linear.*MixtralPreTrainedModel"):
        ak.points(nn.Linear(2, 2), backend="experts")


class Tree(nn.Module):
    """Modules at dotted paths, and nothing else."""

    def __init__(self, leaves: dict[str, nn.Module]) -> None:
        super().__init__()
        for path, leaf in leaves.items():
            parent: nn.Module = self
            *names, last = path.split(".")
            for name in names:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(last, leaf)


@pytest.mark.parametrize(
    ("table", "mixture", "names"),
    [
        (MIXTRAL, "block_sparse_moe", ("w1", "w3", "w2")),
        (QWEN3, "mlp", ("gate_proj", "up_proj", "down_proj")),
        (DEEPSEEK, "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_that_are_modules_have_the_same_points(table: Any, mixture: str, names: tuple[str, ...]) -> None:
    """As in transformers 4."""
    path = f"model.layers.0.{mixture}"
    leaves: dict[str, nn.Module] = {
        f"{path}.experts.{expert}.{name}": nn.Linear(4, 6, bias=False) for expert in range(2) for name in names
    }
    tree = Tree({f"{path}.gate": nn.Linear(4, 2, bias=False), **leaves})
    tree.get_submodule("model.layers.0").add_module("post_attention_layernorm", nn.LayerNorm(4))
    points = resolve(tree, table.groups, "language")
    order = ["moe.gate", "moe.up", "moe.down"]
    assert {p.id: p.path for p in points if p.tags.get("expert") is not None} == {
        f"{role}@language.0.{expert}": f"{path}.experts.{expert}.{name}"
        for expert in range(2)
        for role, name in zip(order, names, strict=True)
    }
    assert [p.path for p in points if p.role in ("moe.router", "mlp")] == [path, f"{path}.gate"]


# --- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_adapters_act_train_and_leave_without_a_trace(name: str, kind: str) -> None:
    check_adapter(build(name), run, TYPES[kind])


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_the_kernels_of_transformers_come_back_with_the_base(name: str) -> None:
    model = build(name, dtype=torch.float32)
    assert model.config._experts_implementation == "grouped_mm"
    check_adapter(model, run, TYPES["lora"])


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_half_precision(name: str, kind: str) -> None:
    check_half(build(name, dtype=torch.bfloat16), TYPES[kind])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_at_every_weight(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check_merge(build(name, dtype=dtype), run, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_no_forward_and_no_backward_makes_the_weights_of_all_experts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: StackedWeight) -> Tensor:
        raise AssertionError("the whole stack was made")

    monkeypatch.setattr(StackedWeight, "whole", refuse)
    model, _ = adapted(name, ak.LoRA(rank=2, targets="moe.*"), dtype=torch.float32)
    run(model).sum().backward()


@pytest.mark.parametrize("name", ["GptOss", "Llama4"])
def test_a_file_gives_back_the_bits(name: str, tmp_path: Path) -> None:
    check_file(name, TYPES["lora"], tmp_path)


@pytest.mark.parametrize("name", ["Mixtral", "Llama4"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    check_checkpointing(
        build(name),
        run,
        lambda model: model.activation_checkpointing_enable({"use_reentrant": False}),
        TYPES["lora"],
    )


@pytest.mark.parametrize(("name", "kind"), [pair for pair in EVERY if pair[1] != "bottleneck"])
def test_cached_generation_equals_uncached(name: str, kind: str) -> None:
    check_generation(adapted(name, TYPES[kind])[0], input_ids=tokens(), attention_mask=torch.ones_like(tokens()))


def test_gpt_oss_prefixes_share_the_softmax_with_the_sinks() -> None:
    model, adapters = adapted("GptOss", TYPES["prefix"])
    module, prefix = model.model.layers[1].self_attn, adapters.modules("a")["attn.kv@language.1"]
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb  # the family's own rotation

    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    module.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    with torch.no_grad():
        run(model)
    x = seen["hidden_states"]
    q, k, v = (part(x).unflatten(-1, (-1, 6)).transpose(1, 2) for part in (module.q_proj, module.k_proj, module.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
    k, v = (
        torch.cat([front.expand(2, -1, -1, -1), tensor], dim=2).repeat_interleave(2, dim=1)
        for front, tensor in ((prefix.keys, k), (prefix.values, v))
    )
    scores = q @ k.mT / 6**0.5
    scores[..., 3:] += torch.full((9, 9), -torch.inf, dtype=x.dtype).triu(1)
    scores = torch.cat([scores, module.sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)], dim=-1)
    mixed = scores.softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(seen["mixed"], mixed.transpose(1, 2).flatten(2), **EXACT)


@pytest.mark.parametrize("reparam", [None, 3])
def test_deepseek_prefixes_are_in_front_of_the_expanded_keys_and_values(reparam: int | None) -> None:
    model, adapters = adapted("DeepseekV3", ak.Prefix(length=3, init_std=1.0, reparam=reparam))
    module, prefix = model.model.layers[1].self_attn, adapters.modules("a")["attn.kv@language.1"]
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave  # its own rotation

    seen: dict[str, Any] = {}
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    module.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    with torch.no_grad():
        run(model)
    x = seen["hidden_states"]
    q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x))).unflatten(-1, (4, 7)).transpose(1, 2)
    latent, k_turned = module.kv_a_proj_with_mqa(x).split([6, 4], dim=-1)
    both = module.kv_b_proj(module.kv_a_layernorm(latent)).unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = both.split([3, 5], dim=-1)
    turned = apply_rotary_pos_emb_interleave(q[..., 3:], k_turned[:, None], *seen["position_embeddings"])
    q, k = torch.cat([q[..., :3], turned[0]], -1), torch.cat([k, turned[1].expand(-1, 4, -1, -1)], -1)
    k, v = (
        torch.cat([front.expand(2, -1, -1, -1), tensor], dim=2)
        for front, tensor in zip(prefix.prefix(), (k, v), strict=True)  # type: ignore[operator]
    )
    scores = q @ k.mT / 7**0.5
    scores[..., 3:] += torch.full((9, 9), -torch.inf, dtype=x.dtype).triu(1)
    torch.testing.assert_close(seen["mixed"], (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), **EXACT)


def expert_rows(experts: Any, role: str, expert: int, name: str) -> Tensor:
    """One expert's projection in its stack, as a view [out, in]."""
    both, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
    if name in ("GptOss", "Llama4"):
        both, down = both.mT, down.mT
    half = len(both) // 2
    gate, up = (both[::2], both[1::2]) if name == "GptOss" else (both[:half], both[half:])
    return {"moe.gate": gate, "moe.up": up, "moe.down": down}[role]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles_of", ["moe.gate", "moe.{up,down}", "moe.{gate,up,down}@expert>=1"])
def test_lora_on_experts_is_the_equation_on_slices(name: str, roles_of: str) -> None:
    model, adapters = adapted(name, ak.LoRA(rank=2, alpha=3.0, targets=roles_of))
    reference = build(name)
    for key, module in adapters.modules("a").items():
        role, _, site = key.partition("@language.")
        layer, expert = map(int, site.split("."))
        block = reference.model.layers[layer]
        experts = (block.feed_forward if name == "Llama4" else block.mlp).experts
        expert_rows(experts, role, expert, name).add_(1.5 * module.B @ module.A)
    assert not torch.allclose(run(reference), run(build(name)))
    torch.testing.assert_close(run(model), run(reference), **EXACT)
    with adapters.merged():
        for path, parameter in reference.named_parameters():
            torch.testing.assert_close(model.get_parameter(path), parameter, **EXACT, msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_a_router_changes_what_is_chosen_as_its_weight_would(name: str) -> None:
    model, adapters = adapted(name, ak.LoRA(rank=2, alpha=3.0, targets="moe.router"))
    reference = build(name)
    for point in adapters.points("moe.router"):
        module: Any = adapters.modules("a")[point.id]
        reference.get_submodule(point.path).weight.data += 1.5 * module.B @ module.A
    torch.testing.assert_close(run(model), run(reference), **EXACT)


def mixture(block: Any, h: Tensor) -> Tensor:
    """What a block's mixture makes of h [batch, length, features]. Llama 4's gives all tokens in one row."""
    result = (block.feed_forward if hasattr(block, "feed_forward") else block.mlp)(h)
    return (result[0] if isinstance(result, tuple) else result).view(h.shape)


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_with_bottlenecks_is_their_equation(name: str, form: str) -> None:
    model, adapters = adapted(name, ak.Bottleneck(width=5, targets="attn mlp", form=form))
    seen, block = watch(model.model.layers[1]), build(name).model.layers[1]
    run(model, use_cache=False)
    kwargs = {key: value for key, value in seen["kwargs"].items() if key not in ("hidden_states", "past_key_values")}
    sublayers: Any = [
        (lambda h: block.self_attn(h, **kwargs)[0], block.input_layernorm),
        (lambda h: mixture(block, h), block.post_attention_layernorm),
    ]
    modules = [adapters.modules("a")[f"{role}@language.1"] for role in ("attn", "mlp")]
    x = seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"]
    parts = [(module, *part) for module, part in zip(modules, sublayers, strict=True)]
    torch.testing.assert_close(seen["y"], with_bottlenecks(x, parts, form, post_norm=False), **EXACT)
