"""Every file that another tool wrote gives what that tool computed: the few in the repository, and, slowly, all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.formats import foreign
from tests.formats.foreign import ELSEWHERE, Fixture

OPTIONS: dict[str, dict[str, Any]] = {"adapterhub_bert_direft": {"direft": True}}
"""What the user must say, since the file does not."""

UNREADABLE = {
    "adapterhub_bert_prompt": "the tool's prompts look at padding, and what stands behind sees it; others are equal",
    "adapterhub_bert_prompt_prefix": "as adapterhub_bert_prompt",
    "adapterhub_roberta_prompt": "as adapterhub_bert_prompt",
    "lycoris_tlora": "the file lacks the start that the tool subtracts; an SVD of the base gives it back to 2e-5 alone",
    "peft_llama_lora_replicated": "`layer_replication`: the base has to be built with its layers repeated, as is said",
}
"""Those that do not give what the tool computed, and why; plugins/FORMATS.md lists them."""

FEW = foreign.few()


@pytest.mark.parametrize(("name", "folder"), FEW, ids=[name for name, _ in FEW])
def test_some(name: str, folder: Path) -> None:
    foreign.check(Fixture(name, folder), **OPTIONS.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=UNREADABLE[name])] if name in UNREADABLE else [])
        for name in foreign.named() or ["none"]
    ],
)
def test_all(name: str) -> None:
    foreign.check(Fixture(name, ELSEWHERE), **OPTIONS.get(name, {}))


def test_the_few_are_small() -> None:
    assert sum(path.stat().st_size for path in foreign.HERE.rglob("*") if path.is_file()) < 2 << 20
