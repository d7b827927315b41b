"""`adapterkit bake`: a model with an adapter in its weights."""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.adapter_files import file_type, lenient_option, opened, pickle_option
from adapterkit.cli.messages import plain_warnings, say


@click.command("bake", epilog="Example: adapterkit bake ./base style.safetensors ./base-with-style --weight 0.8")
@click.argument("model", metavar="MODEL")
@click.argument("file", metavar="ADAPTER", type=file_type)
@click.argument("output", metavar="OUT", type=file_type)
@click.option("--weight", type=float, default=1.0, show_default=True, help="How strongly the adapter acts.")
@lenient_option
@pickle_option
def command(model: str, file: Path, output: Path, weight: float, lenient: bool, allow_pickle: bool) -> None:
    """Write MODEL anew to OUT, in its own layout, with the adapter in its weights; tensor by tensor."""
    click.get_current_context().with_resource(plain_warnings())
    from adapterkit.errors import ModelNotFoundError
    from adapterkit.tools.bake import bake
    from adapterkit.tools.base import open_base

    if not Path(model).exists():
        raise ModelNotFoundError(f"{model} is no folder or file here; its files are what is written anew")
    base = open_base(model)
    loaded = opened(file, base.points, allow_pickle=allow_pickle, strict=not lenient)
    done = bake(base, Path(model), loaded.checkpoint, output, weight=weight)
    say(f"{output}  {done.tensors} tensors in {', '.join(done.files)}")
    if done.left_out:
        say(f"not taken along, since they hold the weights as they were: {', '.join(done.left_out)}", err=True)
