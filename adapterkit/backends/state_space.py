"""State-space language models of transformers: Mamba.

There is no attention, and so no place for a prefix. A mixer reads most of its weights, at least where its fast kernels
are installed, instead of calling their modules: adapters there need an equivalent weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapterkit.backends.longer import longer_recurrence
from adapterkit.backends.transformers_family import Family, FamilyBackend, stacked
from adapterkit.mapping.family import Read, Tokens, Weight
from adapterkit.plugins.classes import STATE_SPACE

_MAMBA = stacked(
    "backbone",
    (Weight("embed.tokens", "embeddings"), Tokens("tokens", "embeddings")),
    "layers.{layer}",
    (Weight("head", "lm_head"),),
    Weight("ssm.in", "mixer.in_proj"),
    Read("ssm.conv", "mixer.conv1d", form="conv"),
    Read("ssm.x", "mixer.x_proj"),
    Read("ssm.dt", "mixer.dt_proj"),
    Read("ssm.out", "mixer.out_proj"),
)


class StateSpaceBackend(FamilyBackend):
    """Mamba, with its head or without."""

    component = "language"
    name = "state_space"
    generates = True
    families = (Family(STATE_SPACE["mamba"], _MAMBA, lengthening=longer_recurrence),)
    ignored: ClassVar[Mapping[str, str]] = {
        "*.norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*norm_f": "a norm, as above",
        "*.mixer.A_log": "the decay of each state is no projection",
        "*.mixer.D": "a gain per channel is no projection",
    }
