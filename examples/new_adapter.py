"""A new adapter type in one file: written, registered, and used on a language, a vision and a diffusion model.

    python examples/new_adapter.py

The type is SSF, scale and shift of features (Lian et al. 2022, arXiv:2210.08823). It never names a model, and yet it
trains, merges, saves and loads on all three. The models are tiny, random and built from configs: nothing is downloaded,
and the losses show only that the type learns. About half a minute on two cores.
"""

from __future__ import annotations

import copy
import inspect
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.specs import AdapterSpec
from adapterkit.torchvision_ops import ensure_torchvision_ops

# --- the type --------------------------------------------------------------------------------------------------------


class SSFModule(ak.AdapterModule):
    """`y = (1 + scale) * base(x) + shift`, one pair of numbers per feature; both start at 0, which has no effect."""

    def __init__(self, features: int, axes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.axes = (1,) * axes  # a convolution's features lie in front of its spatial axes

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """See `AdapterModule.forward`."""
        y = base(x)
        scale, shift = (p.to(y.dtype).view(-1, *self.axes) for p in (self.scale, self.shift))
        return y + scale * y + shift

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: every row and its bias is scaled, then the bias is shifted."""
        factor = (1 + self.scale).to(weight.dtype)
        rows = weight * factor.view(-1, *(1 for _ in weight.shape[1:]))
        shift = self.shift.to(weight.dtype)
        return rows, shift if bias is None else bias * factor + shift


@dataclass(frozen=True)
class SSF(ak.AdapterConfig):
    """A scale and a shift for every feature of linear layers and convolutions."""

    kinds: ClassVar = frozenset({"weight"})
    targets: str = "attention mlp.*"

    def build(self, point: ak.InjectionPoint) -> SSFModule:
        """See `AdapterConfig.build`."""
        return SSFModule(point.out_features, len(point.layout.kernel))


@ak.hookimpl
def adapterkit_register_adapters() -> list[AdapterSpec]:
    """What makes the type known by name, to files too. In a package, an entry point finds this function."""
    return [AdapterSpec("ssf", f"{__name__}:SSF", kinds={"weight"}, summary="a scale and a shift per feature")]


# --- three models, each with a loss on real data ---------------------------------------------------------------------


@dataclass
class Trial:
    """A model with something to learn.

    Attributes:
        name: What the table calls it.
        model: Frozen, apart from what is added.
        loss: The mean loss over the data; always the same for the same weights.
        targets: Where to act; the type's default where it is None.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    targets: str | None = None


def language() -> Trial:
    """A small Llama with grouped queries, and the bytes of the zen of Python."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    text = inspect.getdoc(ak).encode()
    tokens = torch.tensor(list(text[: len(text) // 32 * 32])).view(-1, 32)
    return Trial("language: Llama", model, lambda m: m(input_ids=tokens, labels=tokens).loss)


def digits(side: int) -> tuple[Tensor, Tensor]:
    """64 handwritten digits [64, 1, side, side] from -1 to 1, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:64], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=side, mode="bilinear"), torch.tensor(data.target[:64])


def vision() -> Trial:
    """A timm vision transformer, whose queries, keys and values are one fused layer, and handwritten digits."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    images, labels = digits(8)
    return Trial("vision: timm ViT", model, lambda m: F.cross_entropy(m(images), labels))


def diffusion() -> Trial:
    """A UNet with cross attention, here also adapted at its convolutions, and the noise in noisy digits."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    images, labels = digits(8)
    words, noise, time = torch.randn(10, 1, 16)[labels], torch.randn_like(images), torch.arange(64) * 15
    share = torch.cos(time / 1000 * torch.pi / 2).view(-1, 1, 1, 1)
    noisy = share * images + (1 - share.square()).sqrt() * noise
    return Trial(
        "diffusion: UNet", model, lambda m: F.mse_loss(m(noisy, time, words).sample, noise), "attention mlp.* res.*"
    )


# --- the same few lines for all --------------------------------------------------------------------------------------


def run(trial: Trial, folder: Path, steps: int = 60) -> list[str]:
    """Trains, merges, saves, loads and detaches; every claim of the table is checked here."""
    model = trial.model.eval()
    pristine = copy.deepcopy(model)
    before = trial.loss(model).item()

    adapters = ak.Adapters(model)
    adapters.add("mine", SSF(trial.targets) if trial.targets else SSF())
    check(trial.loss(model).item() == before, "it has no effect before it is trained")
    optimizer = torch.optim.Adam(adapters.parameters("mine"), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        trial.loss(model).backward()
        optimizer.step()
    with torch.no_grad():
        after = trial.loss(model).item()
        check(after < before, "training lowers the loss")
        with adapters.merged("mine"):
            error = abs(trial.loss(model).item() - after)
        file = adapters.save("mine", folder / f"{trial.name[:6]}.safetensors")
        adapters.detach()
        check(trial.loss(model).item() == before, "a detached model is the base, bit for bit")

        fresh = ak.Adapters(pristine)
        fresh.load(file, "mine")
        fresh.activate("mine")
        check(trial.loss(pristine).item() == after, "a loaded adapter is the saved one, bit for bit")
    numbers = sum(p.numel() for p in fresh.parameters("mine"))
    size = f"{file.stat().st_size / 1024:.0f} KiB"
    return [trial.name, f"{numbers:,}", f"{before:.3f}", f"{after:.3f}", f"{error:.0e}", size]


def check(holds: bool, claim: str) -> None:
    """Raises where a claim of this script does not hold."""
    if not holds:
        raise RuntimeError(f"this should hold, and does not: {claim}")


def length_of_type() -> int:
    """Lines of code from the module to the hook, without blank ones."""
    parts = [inspect.getsource(part) for part in (SSFModule, SSF, adapterkit_register_adapters)]
    return sum(bool(line.strip()) for part in parts for line in part.splitlines())


def main() -> None:
    """Prints one line per model."""
    ensure_torchvision_ops()
    ak.get_plugin_manager().register(sys.modules[__name__], name="ssf")
    torch.manual_seed(0)
    columns = ("model", "parameters", "loss before", "after", "merged - active", "file")
    table = Table(*columns, title=f"SSF: a new adapter type in {length_of_type()} lines")
    with tempfile.TemporaryDirectory() as folder:
        for make in (language, vision, diffusion):
            table.add_row(*run(make(), Path(folder)))
    Console().print(table)


if __name__ == "__main__":
    main()
