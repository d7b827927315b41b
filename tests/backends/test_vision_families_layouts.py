"""The tables also know the module names of transformers 4: same ids, same shapes, the same layers behind them."""

from __future__ import annotations

import pytest
from torch import nn

from adapterkit.backends.transformers_family import Family
from adapterkit.backends.vision_transformers import (
    BEIT,
    CLIP_VISION,
    DINOV2,
    DINOV3,
    SIGLIP_TEXT,
    SIGLIP_VISION,
    SWIN,
)
from adapterkit.mapping.family import resolve
from tests.backends import vision_families as families

_SPLIT_ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_SPLIT_MLP = {
    "mlp.fc1": "intermediate.dense",
    "mlp.activation_fn": "intermediate.intermediate_act_fn",
    "mlp.fc2": "output.dense",
}
# What a name of transformers 5 was in 4; whatever is not listed kept its name.
RENAMED: dict[str, tuple[Family, dict[str, str]]] = {
    "dinov2": (DINOV2, _SPLIT_ATTENTION),
    "dinov2 registers": (DINOV2, _SPLIT_ATTENTION),
    "dinov3": (DINOV3, {"model.layer": "layer"}),
    "beit": (BEIT, {"beit.layers": "beit.encoder.layer", **_SPLIT_ATTENTION, **_SPLIT_MLP}),
    "swin": (
        SWIN,
        {
            **{new: old.replace("attention.attention", "attention.self") for new, old in _SPLIT_ATTENTION.items()},
            **_SPLIT_MLP,
        },
    ),
    "clip": (CLIP_VISION, {}),
    "siglip": (SIGLIP_VISION, {"": "vision_model."}),
    "siglip text": (SIGLIP_TEXT, {"": "text_model."}),
}


def old_layout(new: nn.Module, renamed: dict[str, str]) -> nn.Module:
    """The leaves of a model under the names that they had; what computed with them is left out."""
    root = nn.Module()
    for path, leaf in new.named_modules():
        if not path or leaf._modules:
            continue
        old = renamed.get("", "") + path
        for now, then in renamed.items():
            old = f".{old}.".replace(f".{now}.", f".{then}.").strip(".") if now else old
        parent = root
        for name in old.split(".")[:-1]:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(old.rpartition(".")[2], leaf)
    for module in root.modules():
        module.__dict__.update(num_attention_heads=2, attention_head_size=4)  # what the attentions of 4 say of heads
    return root


@pytest.mark.parametrize("name", RENAMED)
def test_tables_know_the_names_of_transformers_4(name: str) -> None:
    table, renamed = RENAMED[name]
    new = families.build(name)
    old = old_layout(new, renamed)
    assert not set(renamed) & {path for path, _ in old.named_modules()} - {""}
    here = {p.id: p for p in resolve(new, table.groups, "vision") if p.kind in ("weight", "attention")}
    there = {p.id: p for p in resolve(old, table.groups, "vision")}
    assert set(here) <= set(there)
    for key, point in here.items():
        same = there[key]
        if key.startswith("attn.kv") and name == "swin":
            continue  # widths per stage, which the stand-in does not tell
        assert (same.shape, same.tags, same.kind) == (point.shape, point.tags, point.kind)
        if point.kind == "weight":
            assert old.get_submodule(same.path) is new.get_submodule(point.path)


@pytest.mark.parametrize("name", ["beit", "swin"])
def test_outputs_are_at_the_modules_of_transformers_4(name: str) -> None:
    table, renamed = RENAMED[name]
    old = old_layout(families.build(name), renamed)
    outputs = {p.role: p.path.rpartition(".")[2] for p in resolve(old, table.groups, "vision") if p.kind == "output"}
    assert outputs == {"attn": "attention" if name == "beit" else "drop_path", "mlp": "output"}


def test_a_packed_gate_of_transformers_4_is_two_points() -> None:
    """DINOv2's gated feed-forward had gate and value in one projection: silu(first half) * second half."""
    block, root = nn.Module(), nn.Module()
    block.mlp = nn.Module()
    block.mlp.weights_in, block.mlp.weights_out = nn.Linear(4, 12), nn.Linear(6, 4)
    root.encoder = nn.Module()
    root.encoder.layer = nn.ModuleList([block])
    points = resolve(root, DINOV2.groups, "vision")
    spans = {p.role: (p.span.start, p.span.size) for p in points if p.span}
    assert spans == {"mlp.gate": (0, 6), "mlp.up": (6, 6)}
    assert [p.role for p in points] == ["mlp.gate", "mlp.up", "mlp.down"]
