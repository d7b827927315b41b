"""What stands in front of a module's name in the files of kohya's scripts, LyCORIS and the UIs."""

from __future__ import annotations

import re
from dataclasses import dataclass

DENOISER, ANY = "denoiser", "model"
TEXT_1, TEXT_2, TEXT_3, TEXT = "text_encoder", "text_encoder_2", "text_encoder_3", "text"
"""The models that files can be about: CLIP-L, CLIP-bigG and T5, and newer text encoders."""


@dataclass(frozen=True)
class Prefix:
    """A beginning of keys.

    Attributes:
        text: The beginning.
        part: Which model of a pipeline is meant; see `pipeline_parts`.
        style: The name of the format whose files have it.
        flat: Whether dots are `_` behind it, up to the tensor's name.
    """

    text: str
    part: str
    style: str
    flat: bool

    @property
    def original(self) -> bool:
        """Whether a name behind it is one of the original checkpoint, where the model's library has it too."""
        return self.text not in _OF_LIBRARIES


_FLAT = {
    "kohya": {
        DENOISER: "lora_unet_ oft_unet_ lora_transformer_ lora_prior_unet_ lora_prior_",
        TEXT_1: "lora_te_ lora_te1_ lora_prior_te_ oft_te_ oft_te1_",
        TEXT_2: "lora_te2_ oft_te2_",
        TEXT_3: "lora_te3_ oft_te3_",
    },
    "lycoris": {ANY: "lycoris_"},
}
_DOTTED = {
    "comfy": {
        DENOISER: "diffusion_model. model.diffusion_model. transformer. unet. prior. base_model.model.",
        TEXT_1: "text_encoders.clip_l.transformer. text_encoders.clip_l. text_encoder. clip_l.transformer.",
        TEXT_2: "text_encoders.clip_g.transformer. text_encoders.clip_g. text_encoder_2. clip_g.transformer.",
        TEXT_3: "text_encoders.t5xxl.transformer. text_encoders.t5xxl. text_encoder_3. t5xxl.transformer.",
    }
}
_OF_LIBRARIES = frozenset(["lycoris_", "lora_transformer_", "transformer.", "unet.", "prior.", "base_model.model."])
PREFIXES = tuple(
    sorted(
        (
            Prefix(text, part, style, table is _FLAT)
            for table in (_FLAT, _DOTTED)
            for style, parts in table.items()
            for part, texts in parts.items()
            for text in texts.split()
        ),
        key=lambda prefix: -len(prefix.text),
    )
)
"""All of them, the longest first."""

_ENCODERS = "text_encoders."
"""A text encoder's name follows: those of CLIP and T5 are prefixes, others are of newer models."""
_BARE = Prefix("", DENOISER, "comfy", False)
_BLOCKS = ("double_blocks.", "single_blocks.", "joint_blocks.", "input_blocks.", "middle_block.", "output_blocks.")
"""How names of original checkpoints begin that no library of models has: they need no prefix to be known."""
_BY_TEXT = {prefix.text: prefix for prefix in PREFIXES}
BEGINNINGS = (*_BY_TEXT, *_BLOCKS, _ENCODERS)
"""How every key begins that has a prefix."""
_ANY = re.compile("|".join(re.escape(text) for text in _BY_TEXT))


def is_original(module: str) -> bool:
    """Whether a dotted name can only be of an original checkpoint."""
    return module.startswith(_BLOCKS)


def prefix_of(key: str) -> Prefix | None:
    """The prefix of a key; None where it has none that is known."""
    if (found := _ANY.match(key)) is not None:
        return _BY_TEXT[found[0]]
    if key.startswith(_BLOCKS):
        return _BARE
    if not key.startswith(_ENCODERS):
        return None
    name = key.removeprefix(_ENCODERS).partition(".")[0]
    text = f"{_ENCODERS}{name}."
    return Prefix(f"{text}transformer." if key.startswith(f"{text}transformer.") else text, TEXT, "comfy", False)
