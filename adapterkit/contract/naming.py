"""The contract of namings: what other tools call the modules of a model, if not as its library does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterkit.contract.view import ComponentView


@dataclass(frozen=True)
class Piece:
    """Rows of a foreign module that are a module of ours.

    Attributes:
        path: Our module.
        halves_swapped: Whether its first half of rows is the foreign module's second (scale and shift of a modulation).
        rows: The foreign module's rows (first, number), where the pieces do not simply follow one another.
    """

    path: str
    halves_swapped: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class KnownBase:
    """What files say of the base that they are for.

    Attributes:
        version: To kohya's scripts and the UIs (`ss_base_model_version`): `sdxl_base_v1-0`.
        architecture: To ModelSpec: `stable-diffusion-xl-v1-base`.
        implementation: Whose code it is, to ModelSpec.
        width, height: Of its usual pictures, in pixels.
        folded: Whether LoRA in files by ComfyUI's names is `lora_A` and `lora_B`, with no alpha beside them.
    """

    version: str
    architecture: str
    implementation: str
    width: int = 1024
    height: int = 1024
    folded: bool = False


class Naming(ABC):
    """How a family of tools names the modules of models of some classes: original checkpoints, and what trains on them.

    Stateless. Registered with `NamingSpec(name, target, models=("diffusers:FluxTransformer2DModel",))`.
    """

    @abstractmethod
    def modules(self, component: ComponentView) -> Mapping[str, Sequence[Piece]]:
        """Foreign module -> the modules of ours whose rows, one after the other, are its rows.

        Args:
            component: The model. `paths` and `config` say what it has; no name depends on anything else.

        Returns:
            Every module that has another name, or the same: `double_blocks.0.img_attn.qkv` -> three pieces. A module of
            ours that has no counterpart is left out.
        """

    def in_files(self, component: ComponentView, style: str) -> bool:
        """Whether files of such a model have these names; otherwise they have its library's.

        Args:
            component: The model.
            style: `kohya` (of kohya's scripts and LyCORIS: `lora_unet_`) or `comfy` (`diffusion_model.`).
        """
        return True

    def base(self, component: ComponentView) -> KnownBase | None:
        """What files call the base of such a model; None where nothing is agreed."""
        return None
