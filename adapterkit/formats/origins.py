"""Who wrote a file for the UIs, and for which base: from its metadata, or from its keys and shapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterkit.formats.container import Entry

OWN = "adapterkit/"
"""How `modelspec.implementation_version` begins in files of ours; what follows is the version."""
_SCRIPTS = "sd-scripts/"


def tool_of(metadata: Mapping[str, str]) -> tuple[str, str]:
    """The program that wrote a file and its version, each empty where it is unknown."""
    module, implementation = metadata.get("ss_network_module", ""), metadata.get("modelspec.implementation_version", "")
    if implementation.startswith(OWN):
        return "adapterkit", implementation.removeprefix(OWN)
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer", metadata.get("ot_revision", "")
    if name := (software := _json(metadata.get("software"))).get("name"):
        return str(name), str(software.get("version", ""))
    version = metadata.get("ss_sd_scripts_commit_hash", "") or implementation.removeprefix(_SCRIPTS)
    version = "" if version == "unknown" else version
    if module.startswith("lycoris."):
        return "LyCORIS in kohya's sd-scripts", version
    if module in _OF_MUSUBI:
        return "kohya's musubi-tuner", version
    return ("kohya's sd-scripts", version) if module or implementation.startswith(_SCRIPTS) else ("", "")


_OF_MUSUBI = frozenset(
    f"networks.lora_{name}"
    for name in ("wan", "framepack", "flux_kontext", "flux_2", "qwen_image", "kandinsky5", "zimage")
)


def _json(text: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def base_of(metadata: Mapping[str, str], shapes: Iterable[tuple[str, Entry]]) -> str:
    """The base that a file is for, and how that is known; empty where nothing tells.

    Args:
        metadata: The file's.
        shapes: Every key with its shape.
    """
    for key in ("ss_base_model_version", "modelspec.architecture"):
        if (told := metadata.get(key, "")) not in ("", "unknown"):
            model = metadata.get("ss_sd_model_name", "")
            return f"{told} ({key})" + (f", {model}" if model not in ("", "None") else "")
    guess = next(_guesses(shapes), "")
    return f"{guess} (by its keys and shapes)" if guess else ""


_CROSS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""The width of the text that a UNet's attentions see."""
_SIGNS = (
    ("double_stream_modulation", "Flux.2"),
    ("distilled_guidance_layer", "Chroma"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("double_blocks", "Flux"),
    ("single_transformer_blocks", "Flux"),
    ("token_refiner", "HunyuanVideo"),
    ("noise_refiner", "Lumina 2 or Z-Image"),
    ("cross_attn_k_img", "Wan, from pictures"),
    ("self_attn_q", "Wan"),
    ("img_mod", "Qwen-Image"),
)
"""Names of modules, with `_` for dots, that one architecture has; the first that is found counts."""


def _guesses(shapes: Iterable[tuple[str, Entry]]) -> Iterator[str]:
    known = [(key.replace(".", "_"), entry) for key, entry in shapes]
    for key, entry in known:
        if "attn2_to_k_lora_down" in key or "attn2_to_k_lora_A" in key:
            width = entry.shape[1] if len(entry.shape) > 1 else 0
            if width in _CROSS:
                yield _CROSS[width]
    denoiser = [key for key, _ in known if not key.startswith(("lora_te", "text_encoder"))]
    for sign, name in _SIGNS:
        if any(sign in key for key in denoiser):
            yield name
