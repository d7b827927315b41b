"""The checks of an adapter type, for pytest and without it."""

from __future__ import annotations

import adapterkit as ak
from adapterkit.errors import ConfigError
from adapterkit.testing.company import CompanyChecks
from adapterkit.testing.effects import EffectChecks
from adapterkit.testing.places import PlaceChecks
from adapterkit.testing.reports import CheckReport, run_checks
from adapterkit.testing.sides import SideChecks
from adapterkit.testing.states import StateChecks


class AdapterConformance(EffectChecks, CompanyChecks, SideChecks, StateChecks, PlaceChecks):
    """Every check of an adapter type. Derive from it and say what it is about.

        class TestGate(AdapterConformance):
            config = Gate()

    A config for each way of computing is worth a class of its own. `Case` says what else can be said.
    """


def check_adapter(adapter: str | ak.AdapterConfig) -> CheckReport:
    """Runs every check on a type, without pytest.

    Args:
        adapter: The name of a registered type, whose config needs no arguments, or a config.

    Raises:
        UnknownNameError: No type has the name.
        ConfigError: The type's config needs arguments: give a config.
    """
    name = adapter if isinstance(adapter, str) else type(adapter).__name__
    config = _default_config(adapter) if isinstance(adapter, str) else adapter
    return run_checks(name, type(f"Test{name}", (AdapterConformance,), {"config": config})())


def _default_config(name: str) -> ak.AdapterConfig:
    cls = ak.get_plugin_manager().adapter(name).load()
    try:
        return cls()
    except (TypeError, ConfigError) as error:
        raise ConfigError(
            [f"{cls.__name__}() is no config ({error}); call check_adapter with one, in a test of your own"], name
        ) from error
