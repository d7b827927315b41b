"""`adapterkit chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.messages import say
from adapterkit.errors import AdapterKitError, near_matches

if TYPE_CHECKING:
    from adapterkit.training.language.opening import Opened
    from adapterkit.training.language.talk import Talk

_SEED = click.IntRange(0, 2**63, max_open=True)


@click.command("chat", epilog="Example: adapterkit chat runs/assistant --system 'Answer in one sentence.'")
@click.argument("adapter", metavar="[RUN_FILE_OR_MODEL]", required=False)
@click.option("--model", help="The base; a run folder, and a file of one, know their own.")
@click.option("--system", default="", help="What the assistant is told first.")
@click.option("--template", help="The file of a chat template, or turns.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.7, show_default=True, help="0: the likeliest token.")
@click.option("--seed", type=_SEED, default=42, show_default=True, help="Of the first answer.")
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="How strongly the adapter acts; 0 is the base."
)
def command(
    adapter: str | None,
    model: str | None,
    system: str,
    template: str | None,
    tokens: int,
    temperature: float,
    seed: int,
    weight: float,
) -> None:
    """Talk to a language model with an adapter of a run folder or a FILE, or with a MODEL alone.

    /help lists what can be done in between. Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from adapterkit.cli.messages import plain_warnings
    from adapterkit.training.language.opening import open_language
    from adapterkit.training.language.talk import Talk
    from adapterkit.training.parts import inference

    click.get_current_context().with_resource(plain_warnings())
    opened = open_language(adapter, model, template)
    if opened.note:
        say(opened.note, err=True)
    opened.weigh(weight)
    opened.writer.chat_template()  # an error now, where there is none
    talk = Talk(opened.writer, system, tokens, temperature, seed)
    with inference(opened.writer.model):
        _converse(opened, talk)


def _converse(opened: Opened, talk: Talk) -> None:
    while True:
        try:
            said = click.prompt(">", prompt_suffix=" ", default="", show_default=False).strip()
        except (click.Abort, EOFError):
            click.echo()
            return
        if said == "/exit":
            return
        try:
            if said.startswith("/"):
                _do(said, opened, talk)
            elif said:
                _answer(talk, said)
        except KeyboardInterrupt:
            click.echo("\n(interrupted; forgotten)")
        except AdapterKitError as error:
            say(f"error: {error}", err=True)


def _answer(talk: Talk, said: str) -> None:
    from adapterkit.cli.streaming import printing

    forgotten = talk.forgotten
    talk.answer(said, printing(talk.writer.tokenizer))
    if talk.forgotten > forgotten:
        click.echo(f"(the model has room for the last messages alone: it no longer sees the first {talk.forgotten})")


def _do(line: str, opened: Opened, talk: Talk) -> None:
    """What a line with a slash asks for."""
    name, _, value = line[1:].partition(" ")
    if name not in _VERBS:
        _explain(name)
        return
    try:
        told = _VERBS[name](value.strip(), opened, talk)
    except (ValueError, OSError) as error:
        told = f"/{name}: {error}"
    if told:
        click.echo(told)


def _explain(name: str) -> None:
    """All commands; or, of one that is none, which are like it."""
    if name not in ("", "help"):
        near = " or ".join(f"/{one}" for one in near_matches(name, [one.partition(" ")[0] for one in _HELP]))
        say(f"/{name} is no command; {f'did you mean {near}? ' if near else ''}/help lists them")
        return
    click.echo("\n".join(f"/{verb:<22}{meaning}" for verb, (meaning, _) in _HELP.items()))


def _again(_: str, __: Opened, talk: Talk) -> str:
    said = talk.undo()
    if not said:
        return "nothing was said"
    _answer(talk, said)
    return ""


def _number(value: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise ValueError(f"wants a number, such as 0.5, not {value!r}")


def _weight(value: str, opened: Opened, _: Talk) -> str:
    opened.weigh(_number(value))
    return f"the adapter acts with weight {_number(value):g}"


def _temperature(value: str, _: Opened, talk: Talk) -> str:
    talk.temperature = max(0.0, _number(value))
    return f"temperature {talk.temperature:g}"


def _system(value: str, _: Opened, talk: Talk) -> str:
    talk.system = value
    talk.reset()
    return "a new conversation"


def _reset(_: str, __: Opened, talk: Talk) -> str:
    talk.reset()
    return "a new conversation"


def _undo(_: str, __: Opened, talk: Talk) -> str:
    return f"taken back: {talk.undo()}"


def _save(value: str, _: Opened, talk: Talk) -> str:
    with Path(value).open("a", encoding="utf-8") as file:
        file.write(talk.row() + "\n")
    return f"a row more in {value}"


_Verb = Callable[[str, "Opened", "Talk"], str]
_HELP: Mapping[str, tuple[str, _Verb | None]] = {
    "again": ("another answer to what was said last", _again),
    "undo": ("take the last answer back, and what it was to", _undo),
    "reset": ("begin a new conversation", _reset),
    "system TEXT": ("begin a new one, and tell the assistant this first", _system),
    "weight NUMBER": ("how strongly the adapter acts; 0 is the base", _weight),
    "temperature NUMBER": ("of what is drawn; 0 takes the likeliest token", _temperature),
    "save FILE": ("add the conversation to a .jsonl file, to be trained on", _save),
    "help": ("this list", None),
    "exit": ("end", None),
}
_VERBS: Mapping[str, _Verb] = {name.partition(" ")[0]: verb for name, (_, verb) in _HELP.items() if verb is not None}
