"""CPT: examples as a prompt, whose vectors move a little (Blau et al. 2024, arXiv:2410.17222)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.points import Kind, TokensPoint

_MAX_LENGTH, _MAX_RADIUS = 2**16, 1e6
_STD, _WIDTH = 0.02, 2048
"""Of start values that are drawn; and the width of a model whose radii are as the config says."""


class CPTModule(ak.AdapterModule):
    """`start` [length, features], the tokens' own vectors, and `move` [moving, features] on those that move."""

    scalable = False

    def __init__(self, features: int, config: CPT) -> None:
        super().__init__()
        self.ids, self.padded = config.tokens, config.padded
        radii = [config.radius_of(kind) for kind in config.kinds_of_tokens]
        self.moving = [i for i, radius in enumerate(radii) if radius is not None]
        self.radii = [radius * math.sqrt(features / _WIDTH) for radius in radii if radius is not None]
        self.from_base = bool(self.ids)
        self.register_buffer("start", torch.empty(len(radii), features).normal_(std=_STD))
        self.move = nn.Parameter(torch.zeros(len(self.moving), features))

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        """See `AdapterModule.initialise`."""
        rows = weight.shape[1]
        if found := [i for i in self.ids if i >= rows]:
            raise ConfigError([f"{self.at}: the vocabulary has {rows} tokens, and tokens names {found[0]}"], "CPT")
        cast("Tensor", self.start).copy_(weight.mT[torch.tensor(self.ids, device=weight.device)])

    def project(self) -> None:
        """Brings back what has moved further than it may."""
        radii = torch.tensor(self.radii, dtype=self.move.dtype, device=self.move.device)
        norms = torch.linalg.vector_norm(self.move, dim=1)
        self.move.mul_((radii / torch.maximum(norms, radii))[:, None])

    def lengthen(self, tokens: Tensor) -> Tensor:
        start = cast("Tensor", self.start)
        places = torch.tensor(self.moving, device=start.device)
        return start.index_add(0, places, self.move.to(start.dtype)).to(tokens.dtype)


@dataclass(frozen=True)
class CPT(ak.AdapterConfig):
    """A prompt of examples, in which templates and inputs move within a radius and answers do not move at all.

    What moves is brought back into its ball after every step (section 3.3). The paper's loss, which counts the answers
    in the prompt too, is the training's business. There is an effect from the start: that of the examples.

    Attributes:
        tokens: The examples' tokens; empty for vectors that are drawn, where the model has no vocabulary.
        kinds_of_tokens: What each is, modulo 4: 1 a template before an input, 2 an input, 3 a template before an
            answer, 0 an answer; a number below 1 is none of them. Empty for templates alone.
        radius: How far inputs may move, in a model of width 2048; it goes with the root of the width.
        template_radius: The same for templates.
        padded: See `Prompt.padded`.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    neutral: ClassVar[bool] = False
    targets: str = "prompt"
    tokens: tuple[int, ...] = (0,)
    kinds_of_tokens: tuple[int, ...] = ()
    radius: float = 0.1
    template_radius: float = 0.1
    padded: bool = False

    def __post_init__(self) -> None:
        if not self.kinds_of_tokens and isinstance(self.tokens, tuple):
            object.__setattr__(self, "kinds_of_tokens", (1,) * len(self.tokens))
        super().__post_init__()

    def radius_of(self, kind: int) -> float | None:
        """How far a token of this kind may move; None for not at all."""
        if kind < 1 or kind % 4 == 0:
            return None
        return self.radius if kind % 4 == 2 else self.template_radius

    def problems(self) -> list[str]:
        found = []
        if not 1 <= len(self.kinds_of_tokens) <= _MAX_LENGTH:
            found.append(f"tokens must be 1 to {_MAX_LENGTH}, not {len(self.kinds_of_tokens)}")
        if self.tokens and len(self.kinds_of_tokens) != len(self.tokens):
            told = f"there are {len(self.tokens)} tokens, and kinds_of_tokens has {len(self.kinds_of_tokens)}"
            found.append(f"{told}: one for each, or none for templates alone")
        if self.tokens and min(self.tokens) < 0:
            found.append(f"tokens must be whole numbers from 0, not {str(self.tokens)[:80]}")
        for name in ("radius", "template_radius"):
            if not 0 < getattr(self, name) <= _MAX_RADIUS:
                found.append(f"{name} must be more than 0 and at most {_MAX_RADIUS:g}, not {getattr(self, name)!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, TokensPoint) and not point.lengthens:
            return "the sequence cannot be made longer there; use 'prompt', where the family offers it"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> CPTModule:
        return CPTModule(point.out_features, self)

    def after_step(self, modules: Mapping[str, ak.AdapterModule], step: int, steps: int | None) -> None:
        """See `AdapterConfig.after_step`: what has moved too far is brought back."""
        for module in modules.values():
            cast("CPTModule", module).project()
