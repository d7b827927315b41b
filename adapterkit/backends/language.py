"""Language models of transformers: which family a model is of. The families are tables of roles and paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from adapterkit.backend import AttentionSeam, Backend
from adapterkit.backends.family import is_class, resolve
from adapterkit.backends.language_decoders import GEMMA, GPT2, LLAMA, NEOX, OPT, OPT_POST_NORM, PHI3
from adapterkit.backends.language_encoders import BERT, DEBERTA, DEBERTA_NEW_HEAD, MODERNBERT
from adapterkit.backends.language_family import Family
from adapterkit.backends.language_fused import BLOOM, BLOOM_NORMED_RESIDUAL, BLOOM_SLICED, FALCON, MPT
from adapterkit.errors import UnsupportedModelError
from adapterkit.points import InjectionPoint

if TYPE_CHECKING:
    from torch import nn

# Of several families with the same classes, the first whose `when` holds.
FAMILIES = (
    LLAMA,
    GEMMA,
    PHI3,
    GPT2,
    NEOX,
    OPT,
    OPT_POST_NORM,
    BLOOM_SLICED,
    BLOOM_NORMED_RESIDUAL,
    BLOOM,
    FALCON,
    MPT,
    BERT,
    DEBERTA,
    DEBERTA_NEW_HEAD,
    MODERNBERT,
)


def family_of(model: nn.Module) -> Family:
    """The family whose class is among the model's classes, and whose layout its config names.

    Raises:
        UnsupportedModelError: There is none.
    """
    for family in FAMILIES:
        if any(is_class(model, "transformers", name) for name in family.classes) and family.when(model.config):
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.classes))
    raise UnsupportedModelError(
        f"the language backend does not know {type(model).__name__}: it maps models derived from {known}; "
        "leave out backend= to let adapterkit choose"
    )


class LanguageBackend(Backend):
    """Dense language models with any of their heads or none: decoders from GPT-2 to Gemma 3, and encoders."""

    component = "language"
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*LayerNorm": "a norm, as above",
        "*ln_*": "a norm, as above",
        "*norm_[12f]": "a norm, as above",
        "cls.predictions": "holds a bias alone, which is also the bias of its decoder",
        "lm_head": "where it is no projection itself, it holds a bias alone, as above (RoBERTa)",
        "lm_predictions.lm_head": "holds a bias alone; it multiplies by the token embedding (DeBERTa-v2)",
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`."""
        return resolve(model, family_of(model).groups, component)

    def seam(self, model: nn.Module, point: InjectionPoint) -> AttentionSeam:
        """See `Backend.seam`."""
        return family_of(model).seam() if point.kind == "attention" else super().seam(model, point)
