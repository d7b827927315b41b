"""`adapterkit plugins check`: the conformance kit, on what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from adapterkit.catalog import Catalog
from adapterkit.cli.tables import json_option
from adapterkit.errors import AdapterKitError, UnknownNameError
from adapterkit.plugins import get_plugin_manager
from adapterkit.specs import AdapterSpec, BackendSpec, FormatSpec, Spec
from adapterkit.testing.adapters import check_adapter
from adapterkit.testing.formats import check_format
from adapterkit.testing.reports import CheckReport, CheckResult


@click.command("check")
@click.argument("name")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool) -> None:
    """Run the conformance kit on NAME: an adapter type, a format, a backend, a plug-in or a distribution.

    Exits with 1 where a check fails. A backend needs models of its family, which its own tests give it
    (adapterkit.testing.BackendConformance); here it is only loaded.
    """
    reports = [_report(spec) for spec in _named(name)]
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        click.echo("\n\n".join(map(str, reports)))
    ctx.exit(0 if all(reports) else 1)


def _named(name: str) -> list[Spec]:
    """What is registered under a name, or by a plug-in or distribution of that name.

    Raises:
        UnknownNameError: Nothing is.
        PluginError: The plug-in of that name could not be loaded.
    """
    manager = get_plugin_manager()
    every = list(_specs(manager))
    found = [spec for spec in every if spec.name == name]
    found = found or [spec for spec in every if spec.origin and name in (spec.origin.plugin, spec.origin.distribution)]
    if found:
        return found
    for record in manager.records:
        if record.error is not None and name in (record.name, record.dist):
            raise record.error
    names = {spec.name for spec in every} | {record.dist for record in manager.records}
    raise UnknownNameError("adapter type, format, backend or plug-in", name, names, manager.hint())


def _specs(manager: Catalog) -> Iterator[Spec]:
    yield from manager.adapters().values()
    yield from manager.formats().values()
    yield from manager.backends().values()


def _report(spec: Spec) -> CheckReport:
    try:
        if isinstance(spec, AdapterSpec):
            return check_adapter(spec.name)
        target = spec.load()
        if isinstance(spec, FormatSpec):
            return check_format(target)
    except AdapterKitError as error:
        return CheckReport(spec.name, (CheckResult("loads", "error", str(error), "", 0.0),))
    told = "its own tests give it models" if isinstance(spec, BackendSpec) else "there are no checks for it"
    return CheckReport(spec.name, (CheckResult("loads", "passed", told, "", 0.0),))
