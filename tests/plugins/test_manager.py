"""A zoo of broken plug-ins: each is recorded, named in one warning and skipped, and the healthy one beside it works."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from adapterkit import __version__, hookimpl
from adapterkit.errors import PluginConflictError, PluginError, PluginLoadError, UnknownNameError
from adapterkit.plugins import builtin
from adapterkit.plugins.manager import PluginManager, PluginRecord, class_of, get_plugin_manager
from adapterkit.specs import AdapterSpec, CommandSpec
from tests.zoo import GOOD, Install, installer

BUILTIN = {spec.name for spec in builtin.adapterkit_register_adapters()}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs fake distributions, and hides the real ones."""
    for variable in ("LOAD", "STRICT", "TRACE"):
        monkeypatch.delenv(f"ADAPTERKIT_{variable}_PLUGINS", raising=False)
    return installer(tmp_path, monkeypatch)


def load() -> PluginManager:
    manager = PluginManager()
    manager.load_builtin()
    manager.load_entry_points()
    return manager


def record_of(manager: PluginManager, name: str) -> PluginRecord:
    (record,) = (record for record in manager.records if record.name == name)
    return record


def test_a_good_plugin_is_found_by_its_entry_point(install: Install) -> None:
    install("good", GOOD, version="2.5", requires=("adapterkit>=0.1,<0.2", "no-such-package>9"))
    manager = load()
    assert set(manager.adapters()) == BUILTIN | {"gate"}
    assert manager.provider("adapter", "gate") == ("adapterkit-good", "2.5")
    assert manager.provider("adapter", "lora") == ("adapterkit", __version__)
    assert manager.adapter("good:gate") is manager.adapter("gate")
    assert record_of(manager, "good").status == "active"
    assert record_of(manager, "good").provides == ("adapter gate",)


BROKEN = {
    "a missing module": ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
    "a broken binary": ("raise RuntimeError('operator does not exist')", "RuntimeError: operator does not exist"),
    "an exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "a syntax error": ("def (", "SyntaxError"),
    "no hooks": ("x = 1", "implements none of the hooks"),
    "a forgotten decorator": (
        "def adapterkit_register_adapters(): return []",
        "lacks the decorator @adapterkit.hookimpl",
    ),
    "a wrong signature": (
        "@hookimpl\ndef adapterkit_register_adapters(model): return []",
        "Argument(s) {'model'} are declared in the hookimpl but can not be found",
    ),
    "a misspelt hook": (
        "@hookimpl\ndef adapterkit_register_adaptors(): return []",
        "no hook 'adapterkit_register_adaptors'. Did you mean 'adapterkit_register_adapters'",
    ),
    "a raising hook": (
        "@hookimpl\ndef adapterkit_register_adapters(): raise KeyError('boom')",
        "adapterkit_register_adapters raised KeyError: 'boom'",
    ),
    "a hook that raises half-way": (
        "@hookimpl\ndef adapterkit_register_tasks():\n    yield TaskSpec('half', 'a:b')\n    raise OSError('boom')",
        "adapterkit_register_tasks raised OSError: boom",
    ),
    "None": ("@hookimpl\ndef adapterkit_register_formats(): pass", "returned None; expected a list of FormatSpec"),
    "a bare spec": (
        "@hookimpl\ndef adapterkit_register_formats(): return FormatSpec('x', 'a:b')",
        "expected a list of FormatSpec",
    ),
    "a string": ("@hookimpl\ndef adapterkit_register_formats(): return 'x'", "returned 'x'; expected a list"),
    "the wrong spec": (
        "@hookimpl\ndef adapterkit_register_formats(): return [TaskSpec('x', 'a:b')]",
        "expected only FormatSpec",
    ),
    "a class": ("@hookimpl\ndef adapterkit_register_formats(): return [dict]", "returned <class 'dict'>"),
    "the same name twice": (
        "@hookimpl\ndef adapterkit_register_formats(): return [FormatSpec('x', 'a:b'), FormatSpec('x', 'a:c')]",
        "returned format 'x' twice",
    ),
    "a bad name": (
        "@hookimpl\ndef adapterkit_register_formats(): return [FormatSpec('My-Format', 'a:b')]",
        "name 'My-Format' does not match",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_skipped(case: str, install: Install, caplog: pytest.LogCaptureFixture) -> None:
    code, message = BROKEN[case]
    # The broken one also holds a hook that is fine: nothing of it may stay.
    fine = "\n@hookimpl\ndef adapterkit_register_commands(): return [CommandSpec('leftover', 'a:b')]\n"
    install("bad", code + ("" if case in ("no hooks", "a syntax error", "a forgotten decorator") else fine))
    install("good", GOOD)
    manager = load()
    record = record_of(manager, "bad")
    assert (record.status, record.dist, record.version, record.provides) == ("failed", "adapterkit-bad", "1.0", ())
    assert message in str(record.error)
    assert isinstance(record.error, PluginError)
    assert record.error.plugin == "bad"
    assert set(manager.adapters()) == BUILTIN | {"gate"}
    assert "leftover" not in manager.commands()
    assert "half" not in manager.tasks()
    assert not manager.has_plugin("bad")
    assert [(r.levelno, "bad" in r.getMessage()) for r in caplog.records] == [(logging.WARNING, True)]


def test_what_a_plugin_prints_goes_to_stderr(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("good", "print('imported')\n" + GOOD)
    install("late", GOOD.replace('"gate"', '"late"').replace("zoo_good:Gate", "zoo_chatty:Gate"))
    install("chatty", "print('late')\nGate = type('Gate', (), {})\n", entry_points="[console_scripts]\nx = y:z\n")
    assert class_of(load().adapter("late"), object).__name__ == "Gate"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "imported" in captured.err
    assert "late" in captured.err


def test_a_slow_plugin_is_active_and_named(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("slow", "import time; time.sleep(0.6)" + GOOD.replace("gate", "slow"))
    install("good", GOOD)
    manager = load()
    slow, good = record_of(manager, "slow"), record_of(manager, "good")
    assert (slow.status, good.status) == ("active", "active")
    assert slow.seconds >= 0.6 > 0.5 > good.seconds
    assert slow.slow is not None
    assert good.slow is None
    assert ["takes 0.6 s whenever adapterkit starts" in r.getMessage() for r in caplog.records] == [True]


def test_a_plugin_that_imports_torch_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))  # so that it is given back in any case
    monkeypatch.delitem(sys.modules, "timm")
    install("heavy", "import sys, types; sys.modules['timm'] = types.ModuleType('timm')" + GOOD)
    record = record_of(load(), "heavy")
    assert record.heavy == ("timm",)
    assert "importing timm" in str(record.slow)


def test_the_loader_reports_the_original_error_as_the_cause(install: Install) -> None:
    install("bad", "raise RuntimeError('boom')")
    error = record_of(load(), "bad").error
    assert error is not None
    assert isinstance(error.__cause__, RuntimeError)


def test_an_unknown_name_mentions_what_could_not_be_loaded(install: Install) -> None:
    install("bad", "raise RuntimeError('boom')")
    with pytest.raises(
        UnknownNameError, match=r"'lorra'. Did you mean 'lora'.*\? Not loaded: bad \(adapterkit-bad: failed\)"
    ):
        load().adapter("lorra")


class TestConflicts:
    LORA = GOOD.replace('"gate"', '"lora"')

    def test_builtin_names_are_reserved(self, install: Install) -> None:
        install("bad", self.LORA + '\n@hookimpl\ndef adapterkit_resolve_backend(model): return "unet"\n')
        manager = load()
        record = record_of(manager, "bad")
        assert record.status == "conflict"
        assert isinstance(record.error, PluginConflictError)
        assert f"adapter 'lora' comes from adapterkit {__version__} and from adapterkit-bad 1.0" in str(record.error)
        assert manager.adapter("lora").target == "adapterkit.adapters.lora:LoRA"
        assert not manager.has_plugin("bad")

    def test_the_qualified_name_still_resolves(self, install: Install) -> None:
        install("bad", self.LORA)
        manager = load()
        assert manager.adapter("bad:lora").target == "zoo_good:Gate"
        assert manager.adapter("adapterkit:lora") is manager.adapter("lora")
        assert record_of(manager, "bad").provides == ("adapter lora",)

    def test_one_name_that_is_taken_takes_no_other_away(
        self, install: Install, caplog: pytest.LogCaptureFixture
    ) -> None:
        formats = 'return [FormatSpec("native", "a:b"), FormatSpec("mine", "a:c")]'
        install("bad", f"{self.LORA}\n@hookimpl\ndef adapterkit_register_formats(): {formats}\n")
        manager = load()
        assert manager.format("mine").target == "a:c"
        assert manager.format("native").target == "adapterkit.formats.native:NativeFormat"
        assert manager.format("bad:native").target == "a:b"
        record = record_of(manager, "bad")
        assert (record.status, record.provides) == ("conflict", ("adapter lora", "format native", "format mine"))
        assert "adapter 'lora' comes from" in str(record.error)
        assert "format 'native' comes from" in str(record.error)
        assert "'mine'" not in str(record.error)
        assert "is skipped in part" in caplog.text
        manager.unregister(name="bad")
        assert "mine" not in manager.formats()

    def test_two_strangers_clash_the_same_way_in_any_order(self, install: Install) -> None:
        install("zebra", GOOD, version="3.0")
        install("ant", GOOD, version="4.0")
        manager = load()
        assert manager.provider("adapter", "gate") == ("adapterkit-ant", "4.0")
        assert "from adapterkit-ant 4.0 and from adapterkit-zebra 3.0" in str(record_of(manager, "zebra").error)

    def test_two_distributions_with_one_entry_point_name(self, install: Install) -> None:
        install("ant", GOOD, entry="same")
        install("bee", GOOD.replace('"gate"', '"other"'), entry="same")
        manager = load()
        first, second = (record for record in manager.records if record.name == "same")
        assert (first.dist, first.status) == ("adapterkit-ant", "active")
        assert (second.dist, second.status) == ("adapterkit-bee", "conflict")
        assert "adapterkit-ant 1.0 and adapterkit-bee 1.0 both provide" in str(second.error)
        assert "other" not in manager.adapters()

    def test_a_distribution_that_is_on_the_path_twice_counts_once(self, install: Install) -> None:
        install("good", GOOD, version="1.0")
        install("good", GOOD, version="2.0")
        manager = load()
        assert record_of(manager, "good").version == "2.0"  # the one in front


class TestVersions:
    @pytest.mark.parametrize("requirement", ["adapterkit>=9", "AdapterKit <0.1", 'adapterkit==7; python_version>"3"'])
    def test_an_incompatible_one_is_not_even_imported(self, requirement: str, install: Install) -> None:
        install("bad", "raise SystemExit('imported')", requires=(requirement,))
        record = record_of(load(), "bad")
        assert record.status == "incompatible"
        assert f"this is adapterkit {__version__}. Run: pip install --upgrade adapterkit-bad" in str(record.error)

    @pytest.mark.parametrize(
        "requirement", ["adapterkit", "adapterkit>=0.1", 'adapterkit>=9; extra == "x"', "adapterkit-other>=9"]
    )
    def test_a_compatible_one_is_loaded(self, requirement: str, install: Install) -> None:
        install("good", GOOD, requires=(requirement,))
        assert record_of(load(), "good").status == "active"

    def test_a_requirement_that_cannot_be_parsed_is_a_failure(self, install: Install) -> None:
        install("bad", GOOD, requires=("adapterkit >>> 1",))
        assert record_of(load(), "bad").status == "failed"


class TestMetadata:
    @pytest.mark.parametrize("text", ["[adapterkit]\nbad\n", b"[adapterkit]\nbad = \xff\xfe\n"])
    def test_broken_metadata_stops_nobody_else(self, text: str | bytes, install: Install) -> None:
        install("bad", entry_points=text)
        install("good", GOOD)
        manager = load()
        assert "gate" in manager.adapters()
        (record,) = (record for record in manager.records if record.status != "active")
        assert "cannot be read" in str(record.error)
        assert "adapterkit_bad" in str(record.error)

    @pytest.mark.filterwarnings("ignore:Implicit None on return values is deprecated")
    @pytest.mark.parametrize("metadata", [None, "Metadata-Version: 2.1\nName: adapterkit-bad\n", "Version: 1.0\n"])
    def test_a_distribution_without_name_or_version_is_a_failure(self, metadata: str | None, install: Install) -> None:
        (file,) = install("bad", GOOD).glob("*.dist-info/METADATA")
        file.unlink() if metadata is None else file.write_text(metadata)
        install("good", GOOD)
        manager = load()
        assert manager.provider("adapter", "gate") == ("adapterkit-good", "1.0")
        assert "cannot be read" in str(record_of(manager, "adapterkit_bad").error)

    def test_an_entry_point_may_name_an_object(self, install: Install) -> None:
        code = """
        class Hooks:
            @hookimpl
            def adapterkit_register_adapters(self):
                return [AdapterSpec("gate", "zoo_good:Gate", kinds={"output"})]
        hooks = Hooks()
        """
        install("good", code, entry_points="[adapterkit]\ngood = zoo_good:hooks\n")
        assert "gate" in load().adapters()

    def test_an_entry_point_without_its_object_is_a_failure(self, install: Install) -> None:
        install("bad", GOOD, entry_points="[adapterkit]\nbad = zoo_bad:nothing\n")
        assert "has no attribute 'nothing'" in str(record_of(load(), "bad").error)


class TestEnvironment:
    def test_the_allow_list_names_distributions(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        install("good", GOOD)
        install("bad", "raise SystemExit('imported')")
        monkeypatch.setenv("ADAPTERKIT_LOAD_PLUGINS", " Adapterkit_Good ,")
        manager = load()
        assert "gate" in manager.adapters()
        assert (record_of(manager, "bad").status, record_of(manager, "bad").error) == ("blocked", None)

    def test_an_empty_allow_list_allows_none(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        install("good", GOOD)
        monkeypatch.setenv("ADAPTERKIT_LOAD_PLUGINS", "")
        manager = load()
        assert set(manager.adapters()) == BUILTIN
        assert record_of(manager, "good").status == "blocked"

    def test_an_allowed_name_that_is_not_installed_is_reported(
        self, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install("good", GOOD)
        monkeypatch.setenv("ADAPTERKIT_LOAD_PLUGINS", "adapterkit-good,adapterkit-god")
        assert "pip install adapterkit-god" in str(record_of(load(), "adapterkit-god").error)

    @pytest.mark.parametrize("code", ["raise RuntimeError('boom')", GOOD.replace('"gate"', '"lora"')])
    def test_strict_mode_raises(self, code: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        install("bad", code)
        monkeypatch.setenv("ADAPTERKIT_STRICT_PLUGINS", "1")
        with pytest.raises(PluginError, match="plug-in 'bad'"):
            load()
        monkeypatch.setenv("ADAPTERKIT_STRICT_PLUGINS", "0")
        load()

    def test_tracing_prints_each_hook_call(
        self, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install("good", GOOD)
        monkeypatch.setenv("ADAPTERKIT_TRACE_PLUGINS", "1")
        get_plugin_manager.__wrapped__()
        error = capsys.readouterr().err
        assert error.count("adapterkit_register_adapters") >= 2
        assert "gate" in error


class Hooks:
    """A plug-in as an object."""

    def __init__(self, *adapters: AdapterSpec) -> None:
        self.adapters = adapters

    @hookimpl
    def adapterkit_register_adapters(self) -> tuple[AdapterSpec, ...]:
        return self.adapters


class TestInProcess:
    def test_register_and_unregister_are_inverse(self, manager: PluginManager) -> None:
        before = (list(manager.records), dict(manager.adapters()), manager.get_plugins())
        assert manager.register(Hooks(AdapterSpec("gate", "a:B", kinds=frozenset({"output"}))), name="mine") == "mine"
        assert manager.provider("adapter", "mine:gate") == ("", "")  # nothing that could be installed
        manager.unregister(name="mine")
        assert (list(manager.records), dict(manager.adapters()), manager.get_plugins()) == before
        with pytest.raises(UnknownNameError):
            manager.adapter("mine:gate")

    def test_a_module_may_be_registered(self, manager: PluginManager) -> None:
        module = ModuleType("my_hooks")
        module.adapterkit_register_commands = hookimpl(
            lambda: [CommandSpec("serve", "my_hooks:serve")], specname="adapterkit_register_commands"
        )
        assert manager.register(module, distribution="my-hooks", version="3") == "my_hooks"
        assert manager.provider("command", "serve") == ("my-hooks", "3")

    def test_errors_are_raised_and_leave_nothing(self, manager: PluginManager) -> None:
        before = (list(manager.records), dict(manager.adapters()), manager.get_plugins())
        lora = AdapterSpec("lora", "a:B", kinds=frozenset({"output"}))
        for plugin, error in [(Hooks(lora), PluginConflictError), (Hooks(lora, lora), PluginLoadError)]:
            with pytest.raises(error):
                manager.register(plugin, name="mine")
            assert (list(manager.records), dict(manager.adapters()), manager.get_plugins()) == before
            with pytest.raises(UnknownNameError):
                manager.adapter("mine:lora")

    def test_a_name_or_a_plugin_is_registered_once(self, manager: PluginManager) -> None:
        plugin = Hooks()
        manager.register(plugin, name="mine")
        with pytest.raises(PluginConflictError, match="of this name"):
            manager.register(Hooks(), name="mine")
        with pytest.raises(PluginLoadError, match="already registered under a different name"):
            manager.register(plugin, name="yours")
        assert [record.name for record in manager.records] == ["adapterkit", "mine"]


class Gate:
    """What a spec names."""


class TestAsking:
    def test_provider_refuses_an_unknown_kind(self, manager: PluginManager) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown kind 'adaptor'. Did you mean 'adapter'"):
            manager.provider("adaptor", "lora")

    def test_the_tables_cannot_be_written_to(self, manager: PluginManager) -> None:
        with pytest.raises(TypeError):
            manager.adapters()["x"] = manager.adapter("lora")

    def test_spec_of_finds_a_config_class_and_imports_nothing(
        self, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert manager.spec_of(Gate) is None
        here = AdapterSpec("gate", f"{Gate.__module__}:Gate", kinds=frozenset({"output"}))
        manager.register(Hooks(here), name="here")
        assert manager.spec_of(Gate) == here
        assert manager.spec_of(Hooks) is None

    def test_spec_of_follows_a_re_export(self, manager: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "zoo_package", SimpleNamespace(Gate=Gate))
        spec = AdapterSpec("gate", "zoo_package:Gate", kinds=frozenset({"output"}))
        manager.register(Hooks(spec), name="here")
        assert manager.spec_of(Gate) == spec


@pytest.mark.parametrize("kind", ["adapters", "backends", "formats", "tasks", "commands"])
def test_every_target_of_the_builtins_loads(kind: str, manager: PluginManager) -> None:
    specs = getattr(manager, kind)()
    loaded = {name: spec.load() for name, spec in specs.items()}
    assert all(callable(value) for value in loaded.values())
    if kind == "adapters":
        assert {name: manager.spec_of(cls) for name, cls in loaded.items()} == dict(specs)
