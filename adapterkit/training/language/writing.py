"""A model of transformers and its tokenizer in a folder, as both load themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterkit.training.language.tokens import forget_calls
from adapterkit.training.loading import bars_on_terminals_only


def write_language_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes weights, config, the settings of generation where there are any, tokenizer and chat template.

    Args:
        model: Without adapters.
        tokenizer: With the chat template that the model was trained with.
        folder: Is made.
    """
    with bars_on_terminals_only():
        model.save_pretrained(folder)
        forget_calls(tokenizer)
        tokenizer.save_pretrained(folder)
