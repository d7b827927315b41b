"""Mamba: where its points are, and that the weights which its mixers read are adapted where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.backends.state_space import StateSpaceBackend
from adapterkit.errors import IncompatibleTargetError
from adapterkit.points import WeightLayout
from tests.backends.transformers_models import (
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

BLOCK = "ssm ssm.conv ssm.in ssm.x ssm.dt ssm.out"
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TYPES = {"lora": ak.LoRA(rank=2, alpha=3.0, targets="*"), "bottleneck": ak.Bottleneck(width=5, targets="ssm")}


@pytest.mark.parametrize(("head", "tail"), [("MambaModel", {}), ("MambaForCausalLM", {"": "head"})])
def test_the_points_are_these(head: str, tail: dict[str, str]) -> None:
    model = skeleton("Mamba", head)
    points = StateSpaceBackend().points(model, "language")
    at_root = " ".join(["embed.tokens tokens", *tail.values(), "prompt"])
    assert roles(points) == {"": at_root, "0": BLOCK, "1": BLOCK}
    assert unmapped(model, points, StateSpaceBackend.ignored) == []


def test_the_convolution_is_one_of_a_kernel_per_channel_which_is_read() -> None:
    point = ak.points(skeleton("Mamba"), "ssm.conv@layer=0")[0]
    assert point.layout == WeightLayout(
        "conv", bias=True, kernel=(4,), stride=(1,), padding=(3,), dilation=(1,), groups=32, access="read"
    )
    assert point.shape == (32, 1, 4)


@pytest.mark.parametrize("kind", TYPES)
def test_adapters_act_train_and_leave_without_a_trace(kind: str) -> None:
    check_adapter(build("Mamba"), run, TYPES[kind])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equals_unmerged_at_every_weight(dtype: torch.dtype, tolerance: float) -> None:
    check_merge(build("Mamba", dtype=dtype), run, tolerance)


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision(kind: str) -> None:
    check_half(build("Mamba", dtype=torch.bfloat16, residual_in_fp32=True), TYPES[kind])


def test_a_file_gives_back_the_bits(tmp_path: Path) -> None:
    check_file("Mamba", TYPES["lora"], tmp_path)


@pytest.mark.parametrize("kind", TYPES)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    check_checkpointing(
        build("Mamba"), run, lambda model: model.activation_checkpointing_enable({"use_reentrant": False}), TYPES[kind]
    )


@pytest.mark.parametrize("kind", TYPES)
def test_generation_from_the_recurrent_state_equals_generation_from_the_whole_text(kind: str) -> None:
    check_generation(adapted("Mamba", TYPES[kind])[0], input_ids=tokens(), attention_mask=torch.ones_like(tokens()))


def test_lora_on_what_a_mixer_reads_is_lora_on_its_weights() -> None:
    model, adapters = adapted("Mamba", ak.LoRA(rank=2, alpha=3.0, targets="ssm.*"))
    reference = build("Mamba")
    modules = {"in": "in_proj", "conv": "conv1d", "x": "x_proj", "dt": "dt_proj", "out": "out_proj"}
    for key, module in adapters.modules("a").items():
        role, _, layer = key.partition("@language.")
        weight = getattr(reference.backbone.layers[int(layer)].mixer, modules[role.removeprefix("ssm.")]).weight
        weight.data += 1.5 * (module.B @ module.A.flatten(1)).view_as(weight)
    assert len(adapters.modules("a")) == 10
    torch.testing.assert_close(run(model), run(reference), **EXACT)


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel", "parallel_norm"])
def test_a_block_with_a_bottleneck_is_its_equation(form: str) -> None:
    model, adapters = adapted("Mamba", ak.Bottleneck(width=5, targets="ssm", form=form))
    seen, block = watch(model.backbone.layers[1]), build("Mamba").backbone.layers[1]
    run(model, use_cache=False)
    sublayer: Any = (adapters.modules("a")["ssm@language.1"], block.mixer, block.norm)
    torch.testing.assert_close(seen["y"], with_bottlenecks(seen["args"][0], [sublayer], form, post_norm=False), **EXACT)


def test_a_prefix_is_told_that_there_is_no_attention() -> None:
    with pytest.raises(IncompatibleTargetError, match=r"attention points.*offers: norm, output, tokens, weight"):
        ak.Adapters(build("Mamba")).add("a", ak.Prefix())
