"""PEANuT, DEFT, PaRa, SuperTuning, TinyLoRA, PVeRA, Poly, MultitaskPrompt: conformance."""

from __future__ import annotations

import pytest
from adapterkit_peft_types.deft import DEFT, PaRa
from adapterkit_peft_types.multitask_prompt import MultitaskPrompt
from adapterkit_peft_types.peanut import PEANuT
from adapterkit_peft_types.poly import Poly
from adapterkit_peft_types.pvera import PVeRA
from adapterkit_peft_types.supertuning import SuperTuning
from adapterkit_peft_types.tinylora import TinyLoRA

from adapterkit.testing import AdapterConformance


@pytest.mark.slow
class TestPEANuT(AdapterConformance):
    config = PEANuT(rank=3, depth=1, activation="silu", scale=0.5)


@pytest.mark.slow
class TestDEFT(AdapterConformance):
    config = DEFT(rank=2, basis="qr", alpha=3)


@pytest.mark.slow
class TestPaRa(AdapterConformance):
    config = PaRa(rank=2)


@pytest.mark.slow
class TestSuperTuning(AdapterConformance):
    config = SuperTuning(sparsity=0.8, rank=2, alpha=3)


@pytest.mark.slow
class TestPVeRA(AdapterConformance):
    config = PVeRA(rank=4)


@pytest.mark.slow
class TestPoly(AdapterConformance):
    config = Poly(rank=2, tasks=3, skills=2, splits=2)


@pytest.mark.slow
class TestMultitaskPrompt(AdapterConformance):
    config = MultitaskPrompt(length=3, tasks=2, rank=2)


@pytest.mark.slow
class TestTinyLoRA(AdapterConformance):
    config = TinyLoRA(rank=3, numbers=4, tying=0.5)
