"""Every adapter type in every dense layout: gradients, detaching, merging, files, fused rows and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import adapterkit as ak
from adapterkit.adapters.bottleneck import INPUTS
from adapterkit.engine.bases import SublayerBase
from adapterkit.kernels.spans import read_span
from adapterkit.points import Span
from tests.backends.dense_models import VARIANTS, adapted, build
from tests.backends.language_models import output, shake, tokens

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TYPES = {
    "lora": ak.LoRA(rank=3, alpha=4.5, targets="*"),
    "bottleneck": ak.Bottleneck(width=5, targets="attn mlp"),
    "prefix": ak.Prefix(length=3, init_std=1.0),
}
CASES = [(name, kind) for name in VARIANTS for kind in TYPES if (name, kind) != ("bloom sliced", "bottleneck")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_parameter_gets_a_gradient_and_detaching_restores_the_base(name: str, kind: str) -> None:
    model = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = {path: (type(module), getattr(module, "config", None)) for path, module in model.named_modules()}
    before = output(model, tokens())
    adapters = ak.Adapters(model)
    adapters.add("a", TYPES[kind])
    shake(adapters)
    after = output(model, tokens())
    assert (after - before).abs().max() > 1e-2
    after.square().mean().backward()
    idle = [
        k for k, p in adapters.modules("a").items() if any(q.grad is None or not q.grad.any() for q in p.parameters())
    ]
    assert idle == []
    with adapters.disabled():
        assert torch.equal(output(model, tokens()), before)
    adapters.detach()
    assert torch.equal(output(model, tokens()), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {n: (type(m), getattr(m, "config", None)) for n, m in model.named_modules()} == kinds


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_at_every_weight(name: str, dtype: torch.dtype, bound: float) -> None:
    model, adapters = adapted(name, TYPES["lora"], dtype=dtype, scale=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        active = output(model, tokens())
        with adapters.merged():
            merged = output(model, tokens())
    assert (merged - active).abs().max() <= bound * active.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_gives_back_every_bit(name: str, tmp_path: Path) -> None:
    model, adapters = adapted(name, TYPES["lora"])
    expected = output(model, tokens())
    adapters.save("a", tmp_path / "a.safetensors")
    fresh = build(name)
    handle = ak.Adapters(fresh)
    handle.load(tmp_path / "a.safetensors")
    handle.activate("a")
    assert torch.equal(output(fresh, tokens()), expected)


def per_head(heads: int) -> dict[str, list[int]]:
    """Rows in the order [heads, 3, 4]."""
    rows = torch.arange(12 * heads).view(heads, 3, 4)
    return {role: rows[:, i].flatten().tolist() for i, role in enumerate(("attn.q", "attn.k", "attn.v"))}


def contiguous(**sizes: int) -> dict[str, list[int]]:
    ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
    return {f"attn.{r}": [*range(a, b)] for r, a, b in zip(sizes, ends, ends[1:], strict=False)}


FUSED: dict[str, tuple[str, dict[str, list[int]]]] = {
    "phi3": ("self_attn.qkv_proj", contiguous(q=16, k=8, v=8)),
    "neox": ("attention.query_key_value", per_head(4)),
    "bloom": ("self_attention.query_key_value", per_head(4)),
    "falcon alibi": ("self_attention.query_key_value", per_head(4)),
    "falcon multi-query": ("self_attention.query_key_value", contiguous(q=16, k=4, v=4)),
    "falcon grouped": (
        "self_attention.query_key_value",
        {
            "attn.q": [*range(8), *range(16, 24)],
            "attn.k": [*range(8, 12), *range(24, 28)],
            "attn.v": [*range(12, 16), *range(28, 32)],
        },
    ),
    "mpt": ("attn.Wqkv", contiguous(q=16, k=16, v=16)),
    "modernbert": ("attn.Wqkv", contiguous(q=16, k=16, v=16)),
}


@pytest.mark.parametrize("name", FUSED)
def test_lora_on_fused_rows_is_the_equation_on_these_rows(name: str) -> None:
    model, adapters = adapted(name, ak.LoRA(rank=3, alpha=4.5, targets="attn.{q,v}"))
    reference, (path, rows) = build(name), FUSED[name]
    modules: dict[str, Any] = dict(adapters.modules("a"))
    for key, point in ((point.id, point) for point in adapters.points("attn.{q,v}")):
        weight = reference.get_submodule(point.path).weight
        assert point.path.endswith(path)
        weight[rows[point.role]] += 1.5 * modules[key].B @ modules[key].A
    torch.testing.assert_close(output(model, tokens()), output(reference, tokens()), **EXACT)


@pytest.mark.parametrize("name", FUSED)
def test_the_rows_of_the_values_are_what_the_attention_mixes(name: str) -> None:
    """What the output projection is given is linear in these rows, and in no others."""
    model = build(name, **({"attn_config": {"clip_qkv": None}} if name == "mpt" else {}))
    points = {point.role: point for point in ak.points(model, "attn.*@layer=0")}
    value, seen = points["attn.v"], list[Tensor]()
    projection, rows = model.get_submodule(value.path), FUSED[name][1]["attn.v"]
    assert value.span is not None
    assert read_span(torch.arange(projection.out_features), value.span, 0).tolist() == rows
    model.get_submodule(points["attn.o"].path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(model, tokens())
    for parameter in projection.parameters():
        parameter.data[rows] *= -0.5
    output(model, tokens())
    torch.testing.assert_close(-2 * seen[1], seen[0], **EXACT)


def test_phi3_and_modernbert_name_the_half_behind_the_activation_the_gate() -> None:
    for name, path in (("phi3", "mlp.gate_up_proj"), ("modernbert", "mlp.Wi")):
        model = build(name)
        gate, up = ak.points(model, "mlp.{gate,up}@layer=1")
        assert gate.path.endswith(path)
        assert (gate.role, up.role) == ("mlp.gate", "mlp.up")
        assert (gate.span, up.span) == (Span(0, 24), Span(24, 24))
        module, down, seen = model.get_submodule(gate.path), ak.points(model, "mlp.down@layer=1")[0], []
        model.get_submodule(down.path).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        output(model, tokens())
        module.weight[24:] *= -2.0  # the plain factor: exactly linear
        output(model, tokens())
        torch.testing.assert_close(seen[1], -2.0 * seen[0], **EXACT)


def test_opt_positions_are_adapted_where_they_are_looked_up() -> None:
    model, adapters = adapted("opt", ak.LoRA(rank=3, alpha=4.5, targets="embed.pos"))
    reference = build("opt")
    module: Any = adapters.modules("a")["embed.pos@language"]
    reference.model.decoder.embed_positions.weight.data += (1.5 * module.B @ module.A).T
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(output(model, tokens(), **inputs), output(reference, tokens(), **inputs), **EXACT)


def test_debertas_new_head_sees_the_adapted_embedding_on_both_sides() -> None:
    model, adapters = adapted("deberta new head", ak.LoRA(rank=3, alpha=4.5, targets="embed.{tokens,relative}"))
    reference = build("deberta new head")
    modules: dict[str, Any] = dict(adapters.modules("a"))
    for key, path in (("tokens", "embeddings.word_embeddings"), ("relative", "encoder.rel_embeddings")):
        module = modules[f"embed.{key}@language"]
        delta: Tensor = 1.5 * module.B @ module.A
        reference.deberta.get_submodule(path).weight.data += delta.T
    torch.testing.assert_close(output(model, tokens()), output(reference, tokens()), **EXACT)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "bloom sliced"])
def test_a_bottleneck_is_its_equation_on_the_blocks_own_stream_and_norms(name: str) -> None:
    model, seen = build(name), dict[str, Tensor]()
    points = [p for p in ak.points(model, "attn mlp") if p.tags["layer"] == 1]
    for form, see in INPUTS.items():
        for point in points:
            layout = point.layout
            adapters = ak.Adapters(model)
            adapters.add("a", ak.Bottleneck(width=5, targets=f"{point.role}@layer=1", form=form))
            shake(adapters)
            net: Any = adapters.modules("a")[point.id]
            hooks = keep(model, layout.residual, point.path, seen)
            output(model, tokens())
            adapted_s = seen["s"]
            with adapters.disabled():
                output(model, tokens())
            norms = [None if p is None else model.get_submodule(p) for p in (layout.norm_in, layout.norm_out)]
            h = see(seen["x"], seen["s"], SublayerBase(seen["x"], seen["s"], *norms))
            expected = seen["s"] + net.scale * net.up(torch.relu(net.down(h)))
            torch.testing.assert_close(adapted_s, expected, rtol=1e-6, atol=1e-6)
            for hook in hooks:
                hook.remove()
            adapters.detach()


def keep(model: Any, residual: str, core: str, seen: dict[str, Tensor]) -> list[RemovableHandle]:
    """Keeps the residual stream and the sublayer's output."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else next(iter(kwargs.values()))

    def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        seen["s"] = result.clone()

    return [
        model.get_submodule(residual).register_forward_pre_hook(before, with_kwargs=True),
        model.get_submodule(core).register_forward_hook(after),
    ]


@pytest.mark.parametrize("name", ["gemma2", "phi3", "neox parallel", "bloom", "falcon alibi", "falcon grouped", "mpt"])
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_checkpointing_changes_no_gradient(name: str, kind: str) -> None:
    model, adapters = adapted(name, TYPES[kind])
    model.train()
    gradients: list[list[Tensor | None]] = []
    for _ in range(2):
        model.zero_grad()
        output(model, tokens(), use_cache=False).square().mean().backward()
        gradients.append([parameter.grad for parameter in adapters.parameters("a")])
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
