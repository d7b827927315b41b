"""(IA)3 against its equations, and as a guest in adapterkit on three modalities."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapterkit_ia3.ia3 import IA3, ScaledInput, ScaledOutput
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backends.family import weight_layout
from adapterkit.errors import ConfigError, IncompatibleTargetError, SelectorError
from adapterkit.kernels.spans import read_span
from adapterkit.kernels.weights import canonical
from adapterkit.points import InjectionPoint, OutputLayout, OutputPoint, Span, WeightPoint
from adapterkit.testing import AdapterConformance

# --- one projection ---------------------------------------------------------------------------------------------------


def image() -> Tensor:
    return torch.randn(2, 6, 9, 8).double()


def sequence() -> Tensor:
    return torch.randn(2, 3, 6).double()


def transposed() -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), sequence),
    "linear-no-bias": (lambda: nn.Linear(6, 8, bias=False), sequence),
    "linear-transposed": (transposed, sequence),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), lambda: torch.randn(2, 6, 9).double()),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2, padding_mode="reflect"), image),
    "conv2d-groups": (lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), image),
}


def point_of(module: nn.Module, role: str, span: Span | None = None) -> InjectionPoint:
    found = weight_layout(module)
    assert found is not None
    layout, inputs, outputs = found
    return WeightPoint(role, "m", "0", inputs, span.features if span else outputs, layout, span)


@pytest.fixture(params=list(MODULES))
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    module, x = MODULES[request.param]
    return module().double(), x()


@pytest.fixture(params=["attn.k", "mlp.down"])
def role(request: pytest.FixtureRequest) -> str:
    return request.param


def built(point: InjectionPoint, randomise: bool = True) -> Any:
    adapter = IA3().build(point).double()
    if randomise:
        nn.init.normal_(adapter.scale)
    return adapter


def test_no_effect_at_initialisation(layer: tuple[nn.Module, Tensor], role: str) -> None:
    module, x = layer
    assert torch.equal(built(point_of(module, role), randomise=False)(x, module), module(x))


def test_output_is_scaled_with_its_bias() -> None:
    module, x = nn.Linear(6, 8).double(), sequence()
    adapter = built(point_of(module, "attn.k"))
    assert isinstance(adapter, ScaledOutput)
    expected = adapter.scale * (x @ module.weight.T + module.bias)
    assert torch.allclose(adapter(x, module), expected, atol=1e-12)


def test_input_is_scaled_and_the_bias_is_not() -> None:
    module, x = nn.Linear(6, 8).double(), sequence()
    adapter = built(point_of(module, "mlp.down"))
    assert isinstance(adapter, ScaledInput)
    assert torch.allclose(adapter(x, module), (x * adapter.scale) @ module.weight.T + module.bias, atol=1e-12)


def test_channels_are_scaled_in_a_convolution() -> None:
    module, x = nn.Conv2d(6, 8, 3).double(), image()
    output, of_input = built(point_of(module, "attn.k")), built(point_of(module, "mlp.down"))
    assert torch.allclose(output(x, module), torch.einsum("c,bcij->bcij", output.scale, module(x)), atol=1e-12)
    assert torch.allclose(of_input(x, module), module(torch.einsum("c,bcij->bcij", of_input.scale, x)), atol=1e-12)


def test_merged_equals_unmerged(layer: tuple[Any, Tensor], role: str) -> None:
    module, x = layer
    point = point_of(module, role)
    adapter, layout = built(point), point.layout
    active = adapter(x, module)
    assert not torch.allclose(active, module(x), atol=1e-3)
    weight, bias = adapter.merged(canonical(module.weight.detach(), layout), module.bias)
    assert (bias is None) == (module.bias is None)
    module.weight.data = canonical(weight.detach(), layout)
    if bias is not None:
        module.bias.data = bias.detach()
    assert torch.allclose(module(x), active, rtol=1e-10, atol=1e-10)


def test_span_of_a_fused_projection(role: str) -> None:
    module, x, span = nn.Linear(6, 8).double(), sequence(), Span(1, 2, count=2, step=4)
    adapter = built(point_of(module, role, span))
    y = adapter(x, lambda x: read_span(module(x), span, -1))
    weight, bias = adapter.merged(read_span(module.weight, span, 0), read_span(module.bias, span, 0))
    assert y.shape == (2, 3, 4)
    assert torch.allclose(y, F.linear(x, weight, bias), atol=1e-12)


def test_half_precision_keeps_its_dtype(role: str) -> None:
    module, x = nn.Linear(6, 8).bfloat16(), sequence().bfloat16()
    adapter = IA3().build(point_of(module, role))
    y = adapter(x, module)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert adapter.scale.grad.dtype == torch.float32  # type: ignore[union-attr,operator]


def test_gradients(role: str) -> None:
    module, x = nn.Conv2d(6, 8, 3, groups=2).double().requires_grad_(False), image()[:1, :, :4, :4].requires_grad_()
    adapter = built(point_of(module, role))
    assert torch.autograd.gradcheck(lambda *_: adapter(x, module), [x, adapter.scale], fast_mode=True)


def test_what_it_refuses() -> None:
    assert "embedding" in str(IA3(scale_input="embed.*").accepts(point_of(nn.Embedding(5, 4), "embed.tokens")))
    sublayer = OutputPoint("mlp", "m", "0", 4, 4, OutputLayout("n"))
    assert "only its output" in str(IA3(scale_input="mlp").accepts(sublayer))
    assert IA3().accepts(sublayer) is None
    grouped = point_of(nn.Conv2d(6, 8, 3, groups=2), "mlp.down", Span(0, 4))
    assert "grouped" in str(IA3().accepts(grouped))
    assert IA3(scale_input=None).accepts(grouped) is None
    assert IA3().accepts(point_of(nn.Conv2d(6, 8, 3, groups=2), "mlp.down")) is None


def test_options() -> None:
    linear = nn.Linear(6, 8)
    assert isinstance(IA3(scale_input=None).build(point_of(linear, "mlp.down")), ScaledOutput)
    assert isinstance(IA3(scale_input="attn.*").build(point_of(linear, "attn.k")), ScaledInput)
    assert IA3.from_dict(IA3(scale_input=None).to_dict()) == IA3(scale_input=None)
    with pytest.raises(ConfigError, match="scale_input must be"):
        IA3(scale_input=3)  # type: ignore[arg-type]
    with pytest.raises(SelectorError):
        IA3(scale_input="{mlp.down")


# --- as a guest -------------------------------------------------------------------------------------------------------


def test_is_found_by_its_entry_point() -> None:
    (entry,) = (e for e in metadata.entry_points(group="adapterkit") if e.name == "ia3")
    assert entry.value == "adapterkit_ia3"
    spec = ak.get_plugin_manager().adapters()["ia3"]
    assert spec.load() is IA3
    assert str(spec.origin).startswith("adapterkit-ia3 ")


def test_the_plugin_module_imports_no_torch() -> None:
    code = "import sys, adapterkit as ak; print('ia3' in ak.get_plugin_manager().adapters(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def llama() -> tuple[nn.Module, tuple[Any, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config), (torch.arange(12).reshape(2, 6),)


def gpt2() -> tuple[nn.Module, tuple[Any, ...]]:
    """Keys and values are parts of a fused, transposed projection with a bias."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), (torch.arange(12).reshape(2, 6),)


def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return model, (torch.randn(2, 3, 16, 16),)


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([1, 7]), torch.randn(2, 5, 12))


MODELS = {"llama": llama, "gpt2": gpt2, "vit": vit, "unet": unet}


@pytest.fixture(params=list(MODELS))
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[], Tensor], str]:
    """A float64 model with its forward, and the targets to use: in the UNet the convolutions too."""
    model, inputs = MODELS[request.param]()
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(bias, std=0.1)
    targets = IA3().targets + (" res.conv1 cross.{k,v}" if request.param == "unet" else "")

    def run() -> Tensor:
        out = model(*inputs)
        return next(o for o in (out, getattr(out, "logits", None), getattr(out, "sample", None)) if torch.is_tensor(o))

    return model, run, targets


Host = tuple[nn.Module, Callable[[], Tensor], str]


def trained(host: Host) -> tuple[ak.Adapters, list[float]]:
    """Some steps from factors of 1 towards what a model with other factors computes."""
    model, run, targets = host
    adapters = ak.Adapters(model)
    adapters.add("style", IA3(targets=targets))
    for parameter in adapters.parameters("style"):
        nn.init.normal_(parameter, mean=1.0, std=0.5)
    target = run().detach()
    for parameter in adapters.parameters("style"):
        nn.init.ones_(parameter)
    optimizer = torch.optim.Adam(adapters.parameters("style"), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.mse_loss(run(), target)
        loss.backward()
        assert all(p.grad is not None for p in adapters.parameters("style"))
        optimizer.step()
        losses.append(loss.item())
    return adapters, losses


def test_changes_nothing_until_it_is_trained(host: Host) -> None:
    model, run, targets = host
    before = run()
    ak.Adapters(model).add("style", IA3(targets=targets))
    assert torch.equal(run(), before)


def test_trains_merges_and_goes(host: Host) -> None:
    model, run, _ = host
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = run()
    adapters, losses = trained(host)
    assert losses[-1] < 0.7 * losses[0]
    active = run()
    assert not torch.allclose(active, before, atol=1e-4)
    with adapters.disabled():
        assert torch.equal(run(), before)
    adapters.merge("style")
    assert torch.allclose(run(), active, rtol=1e-9, atol=1e-9)
    adapters.unmerge()
    assert torch.equal(run(), active)
    adapters.detach()
    assert torch.equal(run(), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


def test_saves_and_loads(host: Host, tmp_path: Path) -> None:
    _, run, _ = host
    adapters, _ = trained(host)
    active = run()
    path = adapters.save("style", tmp_path / "style.safetensors")
    adapters.detach()
    assert not torch.equal(run(), active)
    report = adapters.load(path)
    adapters.activate("style")
    assert torch.equal(run(), active)
    assert report.type == "ia3"
    assert isinstance(adapters.config("style"), IA3)


def test_embeddings_are_refused_before_anything_changes() -> None:
    model, _ = llama()
    adapters = ak.Adapters(model)
    with pytest.raises(IncompatibleTargetError, match="takes indices"):
        adapters.add("style", IA3(targets="embed.tokens", scale_input="embed.*"))
    assert len(adapters) == 0


class TestConformance(AdapterConformance):
    config = IA3()


class TestSublayersConformance(AdapterConformance):
    config = IA3(targets="attn mlp", scale_input=None)


def test_a_stack_multiplies() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4).double()
    adapters = ak.Adapters(torch.nn.Sequential(layer))
    for name in ("a", "b"):
        adapters.add(name, IA3(targets="*", scale_input=None))
        for parameter in adapters.parameters(name):
            parameter.data.normal_()
    a, b = (next(iter(adapters.modules(name).values())).scale for name in ("a", "b"))
    x = torch.randn(2, 3, dtype=torch.float64)
    with adapters.activated(ak.Stack("a", "b")):
        assert torch.allclose(layer(x), a * b * (x @ layer.weight.T + layer.bias), rtol=1e-10, atol=1e-10)
    with adapters.activated(["a", "b"]):
        assert torch.allclose(layer(x), (a + b - 1) * (x @ layer.weight.T + layer.bias), rtol=1e-10, atol=1e-10)
