"""`adapterkit points`: where adapters can act in a model, and what one would add. No weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adapterkit.adapter import AdapterConfig


@click.command("points", epilog="Example: adapterkit points ./stable-diffusion 'attn.*' --adapter lora -o rank=16")
@click.argument("model", metavar="MODEL")
@click.argument("selector", required=False)
@click.option("--adapter", "type_name", help="Count what an adapter of this type would add.")
@click.option("--rank", type=int, help="Short for -o rank=N.")
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="A field of the adapter type.")
@click.option("--full", is_flag=True, help="A line for each point.")
@click.option("--prove", is_flag=True, help="Run a small random copy, and check what is said of each point.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a tree.")
def command(
    model: str,
    selector: str | None,
    type_name: str | None,
    rank: int | None,
    options: tuple[str, ...],
    full: bool,
    prove: bool,
    as_json: bool,
) -> None:
    """Show where adapters can act in MODEL: a folder, a hub id or timm:NAME. Nothing is changed or loaded.

    With --prove the exit code is 1 where something that is said of a point is false.
    """
    fields = (*options, *([f"rank={rank}"] if rank is not None else []))
    if fields and type_name is None:
        raise click.UsageError("-o and --rank describe an adapter: add --adapter TYPE")
    if prove and (selector is not None or type_name is not None or full):
        raise click.UsageError("--prove is of every point of the model: it goes with --json alone")
    adapter = _adapter(type_name, selector, fields) if type_name is not None else None
    from adapterkit.cli.messages import plain_warnings
    from adapterkit.cli.places import show_points, show_remarks
    from adapterkit.handle.listing import points, remarks
    from adapterkit.training.skeleton import skeleton

    context = click.get_current_context()
    context.with_resource(plain_warnings())
    if prove:
        from adapterkit.cli.proofs import show_proofs

        context.exit(0 if show_proofs(skeleton(model), as_json=as_json) else 1)
    mapped = skeleton(model)
    found = points(mapped, None if adapter is not None else selector, adapter=adapter)
    show_points(found, as_json=as_json, full=full)
    if selector is None and adapter is None and not as_json:
        show_remarks(remarks(mapped))


def _adapter(type_name: str, selector: str | None, options: tuple[str, ...]) -> AdapterConfig:
    from adapterkit.errors import ConfigError
    from adapterkit.training.config import read_values
    from adapterkit.training.run import check_adapter

    problems: list[str] = []
    values: dict[str, Any] = read_values(None, [f"adapter.{option}" for option in options], problems).get("adapter", {})
    if selector is not None:
        values = {**values, "targets": selector}
    adapter = check_adapter({**values, "type": type_name}, problems)
    if problems or adapter is None:
        raise ConfigError(problems, type_name)
    return adapter
