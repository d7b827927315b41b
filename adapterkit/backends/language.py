"""Language models of transformers: the dense families. Each is a table of roles and paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapterkit.backends.language_decoders import DECODERS
from adapterkit.backends.language_encoders import ENCODERS
from adapterkit.backends.language_fused import FUSED_DECODERS
from adapterkit.backends.transformers_family import FamilyBackend


class LanguageBackend(FamilyBackend):
    """Dense language models with any of their heads or none: decoders from GPT-2 to Gemma 3, and encoders."""

    component = "language"
    name = "language"
    generates = True
    families = (*DECODERS, *FUSED_DECODERS, *ENCODERS)
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*LayerNorm": "a norm, as above",
        "*ln_*": "a norm, as above",
        "*norm_[12f]": "a norm, as above",
        "cls.predictions": "holds a bias alone, which is also the bias of its decoder",
        "lm_head": "where it is no projection itself, it holds a bias alone, as above (RoBERTa)",
        "lm_predictions.lm_head": "holds a bias alone; it multiplies by the token embedding (DeBERTa-v2)",
    }
