"""IP-Adapter: conformance, and diffusers' own numbers from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapterkit_conditioning
import pytest
import torch
from adapterkit_conditioning.ip_adapter import IPAdapter
from torch import Tensor, nn

import adapterkit as ak
from adapterkit import errors
from adapterkit.testing import AdapterConformance

WIDTH, TOKENS = 24, 4


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The package's types have names, installed or not."""
    manager = ak.get_plugin_manager()
    if manager.spec_of(IPAdapter) is not None:
        yield
        return
    manager.register(adapterkit_conditioning, name="conditioning_tests")
    yield
    manager.unregister(name="conditioning_tests")


class TestAtSelfAttention(AdapterConformance):
    config = IPAdapter(targets="attn.kv")


@pytest.mark.slow
class TestOfAnotherWidth(AdapterConformance):
    config = IPAdapter(targets="attn.kv", width=5, context="face")


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 4, 8, 8), torch.arange(rows) + 5, torch.randn(rows, 6, WIDTH)


def moved(model: nn.Module, name: str = "image", config: IPAdapter | None = None, seed: int = 1) -> ak.Adapters:
    """The model with an adapter whose values are no longer zero."""
    adapters = ak.Adapters(model)
    adapters.add(name, config or IPAdapter(), seed=seed)
    torch.manual_seed(seed)
    for module in adapters.modules(name).values():
        nn.init.normal_(module.to_v_ip.weight, std=0.3)  # type: ignore[union-attr,arg-type]
    return adapters


def projected(model: Any, image: Tensor) -> Tensor:
    """The image tokens that diffusers' UNet makes of an image embedding."""
    return model.encoder_hid_proj([image])[0].flatten(1, 2)


def theirs(ours: ak.Adapters) -> Any:
    """A UNet into which diffusers has loaded the same adapter as a file of the paper's authors."""
    model = unet()
    modules = ours.modules("image")
    places = [name.removesuffix(".attn2.processor") for name in model.attn_processors if "attn2" in name]
    paths = {point.path.removesuffix(".attn2"): point.id for point in ours.points("cross.kv")}
    keys = [n for n, name in enumerate(model.attn_processors, start=0) if "attn2" in name]
    state = {
        f"{key}.{part}.weight": getattr(modules[paths[place]], part).weight.detach()
        for key, place in zip(keys, places, strict=True)
        for part in ("to_k_ip", "to_v_ip")
    }
    torch.manual_seed(7)
    image = {
        "proj.weight": torch.randn(TOKENS * WIDTH, 10) * 0.2,
        "proj.bias": torch.zeros(TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    model._load_ip_adapter_weights([{"ip_adapter": state, "image_proj": image}], low_cpu_mem_usage=False)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_it_is_that_of_diffusers(scale: float) -> None:
    base = unet()
    adapters = moved(base)
    adapters.activate({"image": scale})
    other = theirs(adapters)
    for processor in other.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    image, (x, steps, text) = torch.randn(3, 1, 10), inputs()
    expected = other(x, steps, text, added_cond_kwargs={"image_embeds": [image]}).sample
    with adapters.context(image=projected(other, image)):
        found = base(x, steps, text).sample
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with adapters.disabled():
        assert (base(x, steps, text).sample - expected).abs().max() > 1e-3


def test_the_equation_by_hand() -> None:
    """`softmax(Q K^T) V + scale * softmax(Q K_ip^T) V_ip`, at one attention."""
    base = unet()
    adapters = moved(base, config=IPAdapter(targets="cross.kv@stage=mid"))
    (key, module), *_ = adapters.modules("image").items()
    attention = base.get_submodule(next(p.path for p in adapters.points() if p.id == key))
    x, text, image = torch.randn(2, 9, 32), torch.randn(2, 6, WIDTH), torch.randn(2, TOKENS, WIDTH)
    adapters.activate({"image": 0.7})
    with adapters.context(image=image):
        found = attention(x, text)

    def heads(layer: nn.Linear, source: Tensor) -> Tensor:
        return layer(source).unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    def mixed(k: Tensor, v: Tensor) -> Tensor:
        q = heads(attention.to_q, x)
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    text_part = mixed(heads(attention.to_k, text), heads(attention.to_v, text))
    image_part = mixed(heads(module.to_k_ip, image), heads(module.to_v_ip, image))  # type: ignore[arg-type]
    assert torch.allclose(found, attention.to_out[0](text_part + 0.7 * image_part), atol=1e-5)


def test_two_images_and_rows_of_their_own() -> None:
    base = unet()
    adapters = moved(base, "image")
    moved(base, "face", IPAdapter(context="face", width=WIDTH), seed=2)
    x, steps, text = inputs()
    image, face = torch.randn(3, TOKENS, WIDTH), torch.randn(1, 2, WIDTH)
    with adapters.context(image=image), adapters.context(face=face):
        with adapters.routed(["image", None, "face"]):
            routed = base(x, steps, text).sample
        with adapters.activated(["image", "face"]):
            both = base(x, steps, text).sample
    for row, name in enumerate(("image", None, "face")):
        given = {"image": {"image": image[row : row + 1]}, "face": {"face": face}, None: {}}[name]
        with adapters.activated(name), adapters.context(**given):
            alone = base(x[row : row + 1], steps[row : row + 1], text[row : row + 1]).sample
        assert torch.allclose(routed[row : row + 1], alone, atol=1e-5)
    assert not torch.allclose(both, routed, atol=1e-3)


def test_what_is_missing_or_wrong_is_told() -> None:
    base = unet()
    adapters = moved(base)
    x, steps, text = inputs()
    with pytest.raises(errors.ContextError, match=r"adapters\.context\(image="):
        base(x, steps, text)
    with pytest.raises(errors.ContextError, match="2 rows"), adapters.context(image=torch.randn(2, TOKENS, WIDTH)):
        base(x, steps, text)
    with pytest.raises(errors.UnknownNameError, match="image"), adapters.context(imgae=torch.randn(3, TOKENS, WIDTH)):
        pass
    for shape in ((3, TOKENS, WIDTH + 1), (3, WIDTH), (3, 0, WIDTH), (1, TOKENS, WIDTH, 1)):
        with pytest.raises(errors.ContextError, match=r"'image' is \(\d.*image tokens \[rows, tokens, \d+\]"):
            _run(adapters, torch.randn(shape), base, x, steps, text)
    with adapters.disabled():
        base(x, steps, text)


def _run(adapters: ak.Adapters, image: Tensor, base: Any, *inputs: Tensor) -> None:
    with adapters.context(image=image):
        base(*inputs)


def test_files(tmp_path: Path) -> None:
    base = unet()
    adapters = moved(base)
    x, steps, text = inputs()
    base.requires_grad_(False)
    image = torch.randn(1, TOKENS, WIDTH)
    with adapters.context(image=image), torch.no_grad():
        expected = base(x, steps, text).sample
    path = adapters.save("image", tmp_path / "image.safetensors")
    other = unet().requires_grad_(False)
    again = ak.Adapters(other)
    again.load(path)
    again.activate("image")
    with again.context(image=image), torch.no_grad():
        assert torch.equal(other(x, steps, text).sample, expected)


@pytest.mark.parametrize("options", [{"width": 0}, {"context": "an image"}])
def test_wrong_values(options: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        IPAdapter(**options)
