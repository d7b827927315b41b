"""Text on the terminal while it is drawn."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.errors import printable


def printing(tokenizer: Any, *, skip_prompt: bool = True) -> Any:
    """A streamer of transformers that prints whole words as they come, and ends with a new line.

    Args:
        tokenizer: Of the model.
        skip_prompt: Print only what is drawn.
    """
    from transformers import TextStreamer

    class Printing(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            click.echo(printable(text), nl=stream_end)

    return Printing(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
