"""`adapterkit generate`: text from a language model with an adapter, as it is drawn."""

from __future__ import annotations

import sys
from typing import Any

import click

_SEED = click.IntRange(0, 2**63, max_open=True)


@click.command("generate", epilog="Example: adapterkit generate runs/text --prompt 'Once upon a time' --tokens 100")
@click.argument("adapter", metavar="[RUN_FILE_OR_MODEL]", required=False)
@click.option("--model", help="The base; a run folder, and a file of one, know their own.")
@click.option("--prompt", "prompts", multiple=True, help="May be repeated; '-' or none reads standard input.")
@click.option("--chat", is_flag=True, help="Ask the prompt as a user, by the chat template.")
@click.option("--system", default="", help="What the assistant is told first, with --chat.")
@click.option("--template", help="The file of a chat template, or turns.")
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True, help="At most so many.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: the likeliest token.")
@click.option("--seed", "seeds", multiple=True, type=_SEED, default=(42,), show_default=True, help="May be repeated.")
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="How strongly the adapter acts; 0 is the base."
)
def command(
    adapter: str | None,
    model: str | None,
    prompts: tuple[str, ...],
    chat: bool,
    system: str,
    template: str | None,
    tokens: int,
    temperature: float,
    seeds: tuple[int, ...],
    weight: float,
) -> None:
    """Go on from prompts with an adapter of a run folder or a FILE, or with a MODEL alone.

    The text is printed as it is drawn: with the prompt in front, or with --chat the answer alone.
    """
    from adapterkit.cli.messages import plain_warnings, say
    from adapterkit.cli.streaming import printing
    from adapterkit.training.language.opening import open_language
    from adapterkit.training.parts import inference

    click.get_current_context().with_resource(plain_warnings())
    opened = open_language(adapter, model, template)
    if opened.note:
        say(opened.note, err=True)
    opened.weigh(weight)
    writer = opened.writer
    told = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ("-",)]
    before: list[Any] = [{"role": "system", "content": system}] if system else []
    with inference(writer.model):
        for prompt in told:
            asked = [*before, {"role": "user", "content": prompt}]
            start = writer.start_of_answer(asked) if chat else writer.start_of_text(prompt)
            for seed in seeds:
                streamer = printing(writer.tokenizer, skip_prompt=chat)
                writer.write(start, seed=seed, tokens=tokens, temperature=temperature, streamer=streamer)
