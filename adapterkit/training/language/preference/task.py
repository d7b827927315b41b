"""The task `preference`: of two answers the better one is made likelier, with the base itself as the reference."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapterkit.handle.adapters import Adapters
from adapterkit.training.data_record import DataRecord
from adapterkit.training.language import base
from adapterkit.training.language.corpus import read_source
from adapterkit.training.language.likelihood import token_losses, tokens_in
from adapterkit.training.language.packing import IGNORED
from adapterkit.training.language.preference.examples import Judgements, Pairs, Preferences, make_preferences
from adapterkit.training.language.preference.judgements import PREFERENCES
from adapterkit.training.language.preference.objectives import PAIRED, WITHOUT_REFERENCE, Likelihood, Outcome, kto
from adapterkit.training.language.tokens import Encoder
from adapterkit.training.parts import inference, to_device
from adapterkit.training.task import Setting


class Options(base.Options):
    """The keys under `options`.

    The columns of a file are `chosen` and `rejected`, with their `prompt` unless they are lists of messages that begin
    with it; or, for `kto`, `prompt`, `completion` and `label`.

    Attributes:
        objective: The loss: `dpo`, `ipo`, `simpo`, `orpo` of pairs; `kto` of answers that are good or bad.
        beta: How far the answers may go from the reference's: less for more. The weight of the odds ratio in `orpo`.
        label_smoothing: The share of pairs that are the wrong way round, for `dpo`.
        margin: By how much the better answer is to be preferred, for `simpo`.
        good_weight: The weight of good answers, for `kto`.
        bad_weight: The weight of bad answers, for `kto`.
    """

    objective: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    margin: float = Field(0.5, ge=0)
    good_weight: float = Field(1.0, gt=0)
    bad_weight: float = Field(1.0, gt=0)


class PreferenceTask(base.LanguageTask):
    """The reference is the same model with its adapters off: nothing is loaded twice."""

    Options = Options
    options: Options
    larger_is_better = frozenset({"accuracy", "margin"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Reads and tokenizes everything."""
        found = self.preferences
        return DataRecord(found.files, notes=found.notes, facts=found.facts)

    def prepare(self, setting: Setting) -> Pairs | Judgements:
        """The pairs, or answers, to train on."""
        self.device = setting.device
        return self.preferences.training

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `Pairs` and `Judgements`."""
        return self.preferences.training.collate(items, self.pad_id())

    def amount(self, batch: Mapping[str, Any]) -> tuple[int, str]:
        """The tokens of its answers, without padding."""
        return tokens_in(batch["answers"]), "tokens"

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean over pairs, or answers."""
        return self.outcome(batch).losses.mean()

    def evaluate(self) -> Mapping[str, float]:
        """On what was held out: the loss, the share where the model agrees (ties are halves), and the mean margin."""
        held_out, size = self.preferences.held_out, self.config.batch_size
        outcomes = []
        for start in range(0, len(held_out), size):
            items = [held_out.item(number) for number in range(start, min(start + size, len(held_out)))]
            outcomes.append(self.outcome(to_device(self.collate(items), self.device)))
        if not outcomes:
            return {}
        losses = torch.cat([outcome.losses for outcome in outcomes]).double()
        margins = torch.cat([outcome.margins for outcome in outcomes]).double()
        agrees = (margins > 0).double() + (margins == 0).double() / 2
        return {"loss": losses.mean().item(), "accuracy": agrees.mean().item(), "margin": margins.mean().item()}

    def measures(self) -> Collection[str]:
        """See `evaluate`."""
        return ("loss", "accuracy", "margin") if len(self.preferences.held_out) else ()

    def outcome(self, batch: Mapping[str, Any]) -> Outcome:
        """Losses and margins of a batch."""
        answers = batch["answers"]
        policy = likelihood(self.model, answers)
        if self.options.objective == "kto":
            reference, others = self._reference(answers), batch["others"]
            with torch.no_grad():
                drift = likelihood(self.model, others).total - self._reference(others).total
            return kto(policy, reference, drift.mean().clamp(min=0), batch["good"], self.options)
        needed = self.options.objective not in WITHOUT_REFERENCE
        reference = _paired(self._reference(answers)) if needed else _paired(policy)
        return PAIRED[self.options.objective](_paired(policy), reference, self.options)

    def _reference(self, batch: Mapping[str, Tensor]) -> Likelihood:
        """What the base alone makes of a batch."""
        with inference(self.model), Adapters(self.model).disabled():
            return likelihood(self.model, batch)

    @functools.cached_property
    def preferences(self) -> Preferences:
        """The data as tokens; its text is not kept."""
        options = self.options
        places = [self.config.data, *([options.validation] if options.validation else [])]
        sources = [read_source(Path(place), options.columns, PREFERENCES) for place in places]
        source, measured = sources if len(sources) > 1 else (sources[0], None)
        paired = options.objective != "kto"
        return make_preferences(
            source, measured, self.template, Encoder(self.tokenizer), options, self.config, paired=paired
        )


def likelihood(model: Any, batch: Mapping[str, Tensor]) -> Likelihood:
    """Of the answers in a batch: of its tokens that are learnt."""
    return Likelihood(-token_losses(model, batch).sum(1), (batch["labels"][:, 1:] != IGNORED).sum(1))


def _paired(both: Likelihood) -> tuple[Likelihood, Likelihood]:
    """Of a batch whose first half is the better answers."""
    totals, tokens = both.total.chunk(2), both.tokens.chunk(2)
    return Likelihood(totals[0], tokens[0]), Likelihood(totals[1], tokens[1])
