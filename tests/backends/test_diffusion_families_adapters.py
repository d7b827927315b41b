"""What adapters do in diffusion transformers, ControlNets and autoencoders of diffusers."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapterkit as ak
from adapterkit.errors import IncompatibleTargetError
from adapterkit.points import Span
from tests.backends import diffusion_models as models
from tests.backends import vision_checks as checks

LORA = ak.LoRA(rank=2, targets="*")
BOTTLENECK = ak.Bottleneck(width=3, targets="all", activation="gelu")
PREFIX = ak.Prefix(length=3, init_std=1.0, targets="*")
CONFIGS = {"lora": LORA, "bottleneck": BOTTLENECK, "prefix": PREFIX}

# What has no effect on the output. SD3's last block projects queries of the text and drops what they find; its
# ControlNet computes the text's stream to the end and drops it there.
DROPPED = ["attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2", "ff_context"]
PARTS = ("A", "B", "down.weight", "down.bias", "up.weight", "up.bias")
SILENT = {"sd3": DROPPED[:1], "sd3_controlnet": DROPPED}


@pytest.mark.parametrize(
    ("name", "kind"),
    [pair for pair in itertools.product(models.FAMILIES, CONFIGS) if pair != ("autoencoder", "bottleneck")],
)
def test_adapter_comes_acts_and_goes(name: str, kind: str) -> None:
    parameters = itertools.product(
        SILENT.get(name, []), ("attn_q", "attn_o", "attn", "mlp_up", "mlp_down", "mlp"), PARTS
    )
    silent = tuple(f".1.{path}.adapterkit.{role}.a.{part}" for path, role, part in parameters)
    checks.check_adapter(models.FAMILIES[name](), models.run, CONFIGS[kind], silent=silent)


@pytest.mark.parametrize("name", models.FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_merged_equals_unmerged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    if name == "flux" and dtype == torch.float64:
        tolerance = 1e-6  # its rotary embedding is computed in float32, whatever the model's dtype
    checks.check_merge(models.FAMILIES[name]().to(dtype), models.run, tolerance)


def test_an_autoencoder_says_what_it_offers() -> None:
    with pytest.raises(IncompatibleTargetError, match="attention, norm, weight"):
        ak.Adapters(models.autoencoder()).add("a", BOTTLENECK)


def test_sana_offers_no_keys_of_its_linear_attention() -> None:
    assert ak.points(models.sana(), "*.kv").ids == [f"cross.kv@transformer.{i}" for i in range(2)]


@pytest.mark.parametrize("roles", ["attn.o", "mlp.down", "attn.o mlp.down"])
def test_lora_on_a_fused_input_is_lora_on_its_parts(roles: str) -> None:
    """W x with W = [W_attn, W_mlp] and x = [x_attn, x_mlp]; each part has a low-rank update of its own."""
    model = models.flux().double()
    adapters = ak.Adapters(model)
    adapters.add("a", ak.LoRA(rank=2, alpha=5.0, targets=roles))
    checks.randomise(adapters)
    proj, width = model.single_transformer_blocks[1].proj_out, 16
    x = torch.randn(2, 11, proj.in_features, dtype=torch.float64)
    parts = {"attn.o": (proj.weight[:, :width], x[..., :width]), "mlp.down": (proj.weight[:, width:], x[..., width:])}
    expected = proj.bias
    for role, (weight, part) in parts.items():
        factors: Any = adapters.modules("a").get(f"{role}@transformer.single.1")
        delta = 0.0 if factors is None else 2.5 * factors.B @ factors.A
        expected = expected + part @ (weight + delta).T
    assert torch.allclose(proj(x), expected, rtol=0, atol=1e-12)
    with adapters.merged():
        assert torch.allclose(proj(x), expected, rtol=0, atol=1e-12)


def test_value_and_gate_of_sana_are_told_apart() -> None:
    """Doubling the value's rows behind the activation doubles the output; the gate's go through the activation."""
    model = models.sana()
    spans = {p.role: p.span for p in ak.points(model) if p.id.endswith("@transformer.0") and p.span}
    assert spans == {"mlp.up": Span(0, 40), "mlp.gate": Span(40, 40)}
    ff, x = model.transformer_blocks[0].ff, torch.randn(1, 16, 4, 4)
    value, gate = ff.conv_depth(F.silu(ff.conv_inverted(x))).split(40, dim=1)
    assert torch.allclose(ff(x), ff.conv_point(value * F.silu(gate)), atol=1e-6)
    ff.conv_inverted.weight[:40], ff.conv_inverted.bias[:40], ff.conv_depth.bias[:40] = 0, 0, 0
    assert not ff(x).any()  # without a value there is nothing to gate


def network(module: Any, x: torch.Tensor, s: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a bottleneck adds: from the stream x and the sublayer's output s."""
    source = {"pfeiffer": s + x, "houlsby": s, "parallel": x, "parallel_norm": norm(x)}[module.config.form]
    return module.up(F.relu(module.down(source)))


FORMS = pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])


def with_bottlenecks(model: Any, form: str) -> tuple[Any, ak.Adapters]:
    adapters = ak.Adapters(model.double())
    adapters.add("a", ak.Bottleneck(width=3, targets="all", form=form))
    checks.randomise(adapters)
    return adapters.modules("a"), adapters


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@FORMS
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_bottlenecks_of_both_streams_stand_inside_the_gates(name: str, form: str) -> None:
    model: Any = models.FAMILIES[name]()
    modules, adapters = with_bottlenecks(model, form)
    block, site = model.transformer_blocks[0], "0" if name == "sd3" else "double.0"
    streams, temb = {"img": noise(2, 6, 16), "txt": noise(2, 5, 16)}, noise(2, 16)
    image, text = streams["img"], streams["txt"]
    with adapters.disabled():
        normed, gate, shift, scale, gate_mlp, *second = block.norm1(image, emb=temb)
        normed_text, *of_text = block.norm1_context(text, emb=temb)
        outputs = block.attn(hidden_states=normed, encoder_hidden_states=normed_text)
        modulation = {"img": (gate, shift, scale, gate_mlp), "txt": tuple(of_text)}
        norms = {"img": (block.norm1.norm, block.norm2), "txt": (block.norm1_context.norm, block.norm2_context)}
        networks, expected = {"img": block.ff, "txt": block.ff_context}, {}
        for stream, s in zip(("img", "txt"), outputs, strict=True):
            x, (gate, shift, scale, gate_mlp) = streams[stream], modulation[stream]
            s = s + network(modules[f"attn@transformer.{site}.{stream}"], x, s, norms[stream][0])
            y = x + gate[:, None] * s
            if second and stream == "img":
                s = block.attn2(second[0])
                s = s + network(modules[f"attn@transformer.{site}.dual"], x, s, block.norm1.norm)
                y = y + second[1][:, None] * s
            s = networks[stream](norms[stream][1](y) * (1 + scale[:, None]) + shift[:, None])
            s = s + network(modules[f"mlp@transformer.{site}.{stream}"], y, s, norms[stream][1])
            expected[stream] = y + gate_mlp[:, None] * s
    text, image = block(image, text, temb)
    assert torch.allclose(image, expected["img"], rtol=0, atol=1e-11)
    assert torch.allclose(text, expected["txt"], rtol=0, atol=1e-11)


@FORMS
def test_a_single_block_has_one_bottleneck_for_attention_and_mlp(form: str) -> None:
    model: Any = models.flux()
    modules, adapters = with_bottlenecks(model, form)
    block, temb = model.single_transformer_blocks[0], noise(2, 16)
    image, text = noise(2, 6, 16), noise(2, 5, 16)
    x = torch.cat([text, image], dim=1)
    with adapters.disabled():
        normed, gate = block.norm(x, emb=temb)
        s = block.proj_out(torch.cat([block.attn(normed), block.act_mlp(block.proj_mlp(normed))], dim=2))
        s = s + network(modules["mlp@transformer.single.0"], x, s, block.norm.norm)
        expected = x + gate[:, None] * s
    assert torch.allclose(torch.cat(block(image, text, temb), dim=1), expected, rtol=0, atol=1e-11)


@FORMS
def test_bottlenecks_of_pixart(form: str) -> None:
    """The cross-attention has no norm in front and no gate behind it."""
    model: Any = models.pixart()
    modules, adapters = with_bottlenecks(model, form)
    block, x = model.transformer_blocks[0], noise(2, 6, 24)
    text, modulation = noise(2, 5, 24), noise(2, 6 * 24)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        block.scale_shift_table[None] + modulation.view(2, 6, 24)
    ).chunk(6, dim=1)
    with adapters.disabled():
        s = block.attn1(block.norm1(x) * (1 + scale) + shift)
        y = x + gate * (s + network(modules["attn@transformer.0"], x, s, block.norm1))
        s = block.attn2(y, encoder_hidden_states=text)
        y = y + s + network(modules["cross@transformer.0"], y, s, nn.Identity())
        s = block.ff(block.norm2(y) * (1 + scale_mlp) + shift_mlp)
        y = y + gate_mlp * (s + network(modules["mlp@transformer.0"], y, s, block.norm2))
    assert torch.allclose(block(x, encoder_hidden_states=text, timestep=modulation), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    checks.check_checkpointing(
        models.flux(), models.run, lambda model: model.enable_gradient_checkpointing(), CONFIGS[kind]
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_save_and_load_are_bitwise(kind: str, tmp_path: Path) -> None:
    model = models.flux()
    adapters = ak.Adapters(model)
    adapters.add("a", CONFIGS[kind])
    checks.randomise(adapters)
    expected = models.run(model)
    path = adapters.save("a", tmp_path / "a.safetensors")
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    ak.Adapters(other).detach()
    fresh = ak.Adapters(other)
    fresh.load(path, "b")
    fresh.activate("b")
    assert torch.equal(models.run(other), expected)


def test_copies_and_pickles_act_alike() -> None:
    model = models.flux()
    adapters = ak.Adapters(model)
    for name, config in (("a", LORA), ("b", BOTTLENECK), ("c", PREFIX)):
        adapters.add(name, config)
        checks.randomise(adapters, name, scale=0.1)
    adapters.activate(["a", "b", "c"])
    expected = models.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(models.run(twin), expected)
        ak.Adapters(twin).detach()
