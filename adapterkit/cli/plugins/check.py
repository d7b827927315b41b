"""`adapterkit plugins check`: the conformance kit, on what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import click

from adapterkit.cli.tables import json_option
from adapterkit.errors import AdapterKitError, UnknownNameError
from adapterkit.plugins import get_plugin_manager
from adapterkit.plugins.catalog import Catalog
from adapterkit.specs import AdapterSpec, FormatSpec, Spec
from adapterkit.testing.adapters import check_adapter
from adapterkit.testing.formats import check_format
from adapterkit.testing.reports import CheckReport, CheckResult


@click.command("check")
@click.argument("name")
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool) -> None:
    """Run the conformance kit on NAME: an adapter type, a format, a plug-in, a distribution, or what else it provides.

    Exits with 1 where a check fails. A backend needs models of its family, which its own tests give it
    (adapterkit.testing.BackendConformance), and tasks and commands have no checks: these are only loaded.
    """
    reports = _reports(name)
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        click.echo("\n\n".join(map(str, reports)))
    ctx.exit(0 if all(reports) else 1)


def _reports(name: str) -> list[CheckReport]:
    """On what is registered under a name, or by a plug-in or distribution of that name.

    Raises:
        UnknownNameError: There is no such name.
        PluginError: The plug-in of that name could not be loaded.
    """
    manager = get_plugin_manager()
    every = list(_specs(manager))
    if named := [spec for spec in every if spec.name == name]:
        return [_report(spec) for spec in named]
    records = [record for record in manager.records if name in (record.name, record.dist)]
    provided = [spec for spec in every if spec.origin and name in (spec.origin.plugin, spec.origin.distribution)]
    errors = [(record.name, record.error) for record in records if record.error is not None]
    if not provided and errors:
        raise errors[0][1]
    if not provided and not records:
        names = {spec.name for spec in every} | {record.dist for record in manager.records}
        raise UnknownNameError("adapter type, format, backend or plug-in", name, names, manager.hint())
    broken = [_loading(plugin, "error", str(error)) for plugin, error in errors]
    return [*map(_report, provided), *broken] or [_loading(name, "passed", "it registers nothing to check")]


def _specs(manager: Catalog) -> Iterator[Spec]:
    for table in (manager.adapters(), manager.formats(), manager.backends(), manager.tasks(), manager.commands()):
        yield from table.values()


def _report(spec: Spec) -> CheckReport:
    try:
        if isinstance(spec, AdapterSpec):
            return check_adapter(spec.name)
        target = spec.load()
        if isinstance(spec, FormatSpec):
            return check_format(target)
    except AdapterKitError as error:
        return _loading(spec.name, "error", str(error))
    skipped = CheckResult("conformance", "skipped", _UNCHECKED[spec.kind], "", 0.0)
    return CheckReport(spec.name, (*_loading(spec.name, "passed", f"{spec.target} was loaded").results, skipped))


def _loading(name: str, status: Literal["passed", "error"], detail: str) -> CheckReport:
    return CheckReport(name, (CheckResult("loads", status, detail, "", 0.0),))


_UNCHECKED = {
    "backend": "its own tests give it models (adapterkit.testing.BackendConformance)",
    "task": "there is no conformance suite for tasks",
    "command": "there is no conformance suite for commands",
}
