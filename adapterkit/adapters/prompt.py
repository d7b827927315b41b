"""Prompt tuning: learnt positions in front of the sequence, for language models and vision transformers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.errors import ConfigError, did_you_mean
from adapterkit.points import InjectionPoint, Kind, TokensPoint

REPARAMS = ("mlp", "lstm")
INITS = ("normal", "vocabulary")
_MAX_LENGTH = _MAX_WIDTH = 2**16
_MAX_STD = 100.0


class PromptModule(AdapterModule):
    """`prompt` [length, features] is what stands in front.

    Args:
        features: Of the sequence.
        length: Of the prompt.
        init_std: Of the start values.
        ids: Tokens whose vectors are the start values, over and over; an empty one takes any, None takes none.
    """

    scalable = False

    def __init__(self, features: int, length: int, init_std: float, ids: Sequence[int] | None = None) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(length, features).normal_(std=init_std))
        self.ids, self.from_base = ids, ids is not None

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        length, rows = len(self.prompt), weight.shape[1]
        if found := [i for i in self.ids or () if i >= rows]:
            raise ConfigError([f"{self.at}: the vocabulary has {rows} tokens, and init_ids names {found[0]}"], "Prompt")
        ids = torch.tensor(self.ids) if self.ids else torch.randint(rows, (length,))
        self.prompt.copy_(weight.mT[ids[torch.arange(length) % len(ids)].to(weight.device)])

    def lengthen(self, tokens: Tensor) -> Tensor:
        return self.prompt.to(tokens.dtype)


class ReparametrizedPrompt(AdapterModule):
    """A network makes the prompt from `embedding` [length, features] (P-tuning).

    Args:
        features: Of the sequence.
        length: Of the prompt.
        width: Of the hidden layers.
        init_std: Of the embedding.
        recurrent: Whether a two-layer bidirectional LSTM runs over the positions first.
    """

    scalable = False

    def __init__(self, features: int, length: int, width: int, init_std: float, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, features).normal_(std=init_std))
        self.lstm = nn.LSTM(features, width, num_layers=2, bidirectional=True, batch_first=True) if recurrent else None
        middle = [] if recurrent else [nn.Linear(width, width), nn.ReLU()]
        first, inner = (2 * width, 2 * width) if recurrent else (features, width)
        self.mlp = nn.Sequential(nn.Linear(first, inner), nn.ReLU(), *middle, nn.Linear(inner, features))

    def lengthen(self, tokens: Tensor) -> Tensor:
        """See `AdapterModule.lengthen`. It is computed in the parameters' own dtype."""
        h = self.embedding
        if self.lstm is not None:
            h = self.lstm(h[None])[0][0]
        return self.mlp(h).to(tokens.dtype)


@dataclass(frozen=True)
class Prompt(AdapterConfig):
    """Learnt positions that every block attends to and that nothing outside of the model sees.

    At `prompt` they are put into the embedded sequence: prompt tuning of language models (Lester et al. 2021,
    arXiv:2104.08691), whose cached generation works; shallow visual prompt tuning (Jia et al. 2022, arXiv:2203.12119).
    At `prompt.layer` every block has its own, in the place of the last block's: deep visual prompt tuning. With
    `reparam` it is P-tuning (Liu et al. 2021, arXiv:2103.10385). It acts or does not: its weight is 1. Several prompts
    stand one behind the other. There is an effect from the start.

    Attributes:
        targets: "prompt" or "prompt.layer".
        length: Positions.
        reparam: "mlp" or "lstm": a network makes them while training and after; None for none.
        width: Of that network; by default the sequence's.
        init_std: Standard deviation of the start values.
        init: "normal"; or "vocabulary", vectors of the base's own tokens.
        init_ids: Those tokens, over and over where they are fewer than `length`; by default any.
        padded: Whether they stand in front of a row's padding, which then counts as positions, as PEFT has it; by
            default they stand right before a row's first token, so that padding changes nothing. In an encoder, whose
            learnt positions were added before, those of the tokens begin behind them.
        pooled: Whether an encoder returns the prompt's first position in the place of the first token, for a classifier
            that pools there, as PEFT's do.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"tokens"})
    neutral: ClassVar[bool] = False
    targets: str = "prompt"
    length: int = 20
    reparam: str | None = None
    width: int | None = None
    init_std: float = 0.02
    init: str = "normal"
    init_ids: tuple[int, ...] | None = None
    padded: bool = False
    pooled: bool = False

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.length <= _MAX_LENGTH:
            found.append(f"length must be from 1 to {_MAX_LENGTH}, not {self.length!r}")
        if self.reparam is not None and self.reparam not in REPARAMS:
            near = did_you_mean(self.reparam, REPARAMS)
            found.append(f"reparam must be None or one of {', '.join(REPARAMS)}, not {self.reparam!r}.{near}")
        if self.width is not None and not 1 <= self.width <= _MAX_WIDTH:
            found.append(f"width must be None or from 1 to {_MAX_WIDTH}, not {self.width!r}")
        if not 0 < self.init_std <= _MAX_STD:
            found.append(f"init_std must be more than 0 and at most {_MAX_STD:g}, not {self.init_std!r}")
        return found + self._start_problems()

    def _start_problems(self) -> list[str]:
        if self.init not in INITS:
            return [f"init must be one of {', '.join(INITS)}, not {self.init!r}.{did_you_mean(self.init, INITS)}"]
        if self.init == "vocabulary" and self.reparam is not None:
            return ["init='vocabulary' gives the positions themselves, and with reparam a network makes them"]
        if self.init_ids is None:
            return []
        if not isinstance(self.init_ids, tuple) or not all(type(i) is int and i >= 0 for i in self.init_ids):
            return [f"init_ids must be a tuple of whole numbers from 0, not {str(self.init_ids)[:80]}"]
        if not self.init_ids or self.init != "vocabulary":
            return ["init_ids are at least one token for init='vocabulary'"]
        return []

    def accepts(self, point: InjectionPoint) -> str | None:
        if isinstance(point, TokensPoint) and not point.lengthens:
            return "the sequence cannot be made longer there; use 'prompt', where the family offers it"
        return super().accepts(point)

    def alike(self, point: InjectionPoint) -> Hashable:
        return (
            point.out_features,
            self.length,
            self.reparam,
            self.width,
            self.init,
            self.init_ids,
            self.padded,
            self.pooled,
        )

    def build(self, point: InjectionPoint) -> AdapterModule:
        module = self._module(point.out_features)
        module.padded, module.pooled = self.padded, self.pooled
        module.front = self.length if self.padded else 0
        return module

    def _module(self, features: int) -> AdapterModule:
        if self.reparam is None:
            ids = (self.init_ids or ()) if self.init == "vocabulary" else None
            return PromptModule(features, self.length, self.init_std, ids)
        width = self.width or features
        return ReparametrizedPrompt(features, self.length, width, self.init_std, self.reparam == "lstm")
