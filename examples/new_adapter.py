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

    def __init__(self, point: ak.InjectionPoint) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(point.out_features))
        self.shift = nn.Parameter(torch.zeros(point.out_features))
        self.axes = (1,) * (-1 - point.feature_axis)  # a convolution's features lie in front of its spatial axes

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
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
        return SSFModule(point)


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
        predict: What the model says about all the data.
        score: The mean loss of a prediction.
        targets: Where to act.
    """

    name: str
    model: nn.Module
    predict: Callable[[nn.Module], Tensor]
    score: Callable[[Tensor], Tensor]
    targets: str = SSF.targets


def language() -> Trial:
    """A small Llama with grouped queries, and the bytes of adapterkit's own description."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    text = str(ak.__doc__).encode()
    tokens = torch.tensor(list(text[: len(text) // 32 * 32])).view(-1, 32)
    return Trial(
        "Llama",
        model,
        predict=lambda m: m(input_ids=tokens).logits,
        score=lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
    )


def digits() -> tuple[Tensor, Tensor]:
    """32 handwritten digits [32, 1, 8, 8] from -1 to 1, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:32], dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target[:32])


def vision() -> Trial:
    """A timm vision transformer, whose queries, keys and values are one fused layer, and handwritten digits."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():  # timm's initial weights wait for a long training; these answer at once
        if parameter.ndim == 2:
            nn.init.xavier_normal_(parameter)
    images, labels = digits()
    return Trial(
        "timm ViT",
        model,
        predict=lambda m: m(images),
        score=lambda logits: F.cross_entropy(logits, labels),
        targets="attention mlp.* head",  # no preset reaches a head; it has to be named
    )


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
    images, labels = digits()
    words, noise, time = torch.randn(10, 1, 16)[labels], torch.randn_like(images), torch.arange(32) * 30
    share = torch.cos(time / 1000 * torch.pi / 2).view(-1, 1, 1, 1)
    noisy = share * images + (1 - share.square()).sqrt() * noise
    return Trial(
        "UNet",
        model,
        predict=lambda m: m(noisy, time, words).sample,
        score=lambda output: F.mse_loss(output, noise),
        targets="attention mlp.* res.*",
    )


# --- the same few lines for all --------------------------------------------------------------------------------------


def run(trial: Trial, folder: Path, steps: int = 40) -> list[str]:
    """Trains, merges, saves, loads and detaches; every claim of the table is checked here."""
    model = trial.model.eval()
    pristine = copy.deepcopy(model)
    with torch.no_grad():
        base = trial.predict(model)

    adapters = ak.Adapters(model)
    adapters.add("mine", SSF(trial.targets))
    check(torch.equal(trial.predict(model), base), "it has no effect before it is trained")
    fit(trial, adapters, steps)
    with torch.no_grad():
        adapted = trial.predict(model)
        with adapters.merged("mine"):
            rounding = (trial.predict(model) - adapted).abs().max() / adapted.abs().max()
        file = adapters.save("mine", folder / "mine.safetensors")
        adapters.detach()
        check(torch.equal(trial.predict(model), base), "a detached model is the base, bit for bit")

        fresh = ak.Adapters(pristine)
        report = fresh.load(file, "mine")
        fresh.activate("mine")
        check(torch.equal(trial.predict(pristine), adapted), "a loaded adapter is the saved one, bit for bit")
    losses = [f"{trial.score(output).item():.3f}" for output in (base, adapted)]
    return [trial.name, f"{report.parameters:,}", *losses, f"{rounding:.0e}", f"{file.stat().st_size / 1024:.0f}"]


def fit(trial: Trial, adapters: ak.Adapters, steps: int) -> None:
    """Plain torch: the base is frozen already."""
    optimizer = torch.optim.Adam(adapters.parameters("mine"), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        trial.score(trial.predict(trial.model)).backward()
        optimizer.step()


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
    columns = ("model", "parameters", "loss before", "after", "merging error", "KiB")
    table = Table(*columns, title=f"SSF: a new adapter type in {length_of_type()} lines")
    with tempfile.TemporaryDirectory() as folder:
        for make in (language, vision, diffusion):
            table.add_row(*run(make(), Path(folder)))
    Console().print(table)


if __name__ == "__main__":
    main()
