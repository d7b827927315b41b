"""Checks of how an adapter comes and goes: attaching, saving, copying, seeds, configs, errors."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adapterkit as ak
from adapterkit.checkpoint import ReadOptions, WriteOptions
from adapterkit.errors import AdapterKitError, ConfigError, IncompatibleTargetError, MissingKeysError
from adapterkit.formats.source import Source
from adapterkit.specs import Origin
from adapterkit.testing.case import Case
from adapterkit.testing.subject import NAME, Subject, assert_same, expecting, scalar, skip

_WRONG: dict[str, object] = {"int": "many", "float": "much", "bool": "maybe", "str": 3}


class StateChecks(Case):
    """Attachment, files, copies, seeds, configs and errors."""

    def test_attaching_and_detaching_is_exact(self) -> None:
        """Detached, a model has the classes, keys, values, flags and hooks that it had, and the same output."""
        for subject in self.subjects(each=True):
            fresh = subject.example.make().to(subject.dtype).eval()
            subject.adapters.detach()
            assert _anatomy(subject.model) == _anatomy(fresh), f"{subject.label}: detaching left a trace"
            for key, tensor in subject.model.state_dict().items():
                assert_same(tensor, fresh.state_dict()[key], f"{subject.label}: {key}")
            args, kwargs = subject.example.inputs(3, subject.dtype)
            assert_same(subject.model(*args, **kwargs), fresh(*args, **kwargs), f"{subject.label}: the output")

    def test_disabled_is_the_base(self) -> None:
        """With nothing active the output is the base's, bit for bit."""
        for subject in self.subjects():
            fresh = subject.example.make().to(subject.dtype).eval().requires_grad_(False)
            args, kwargs = subject.example.inputs(3, subject.dtype)
            assert_same(subject.bits(None), fresh(*args, **kwargs), f"{subject.label}: the disabled model's output")

    def test_saved_equals_loaded(self) -> None:
        """A saved adapter loads with the same bits, and gives the same output."""
        for subject in self.subjects(each=True):
            self._require_registered()
            subject.model.requires_grad_(False)  # torch rounds another way where a weight requires grad
            expected, state = subject.bits(), _values(subject)
            with tempfile.TemporaryDirectory() as folder:
                path, native = Path(folder) / "adapter.safetensors", ak.get_plugin_manager().format("native").load()()
                native.write({"": subject.adapters.checkpoint(NAME)}, path, subject.adapters.points(), WriteOptions())
                subject.adapters.remove(NAME)
                [checkpoint] = native.read(Source.of(path), subject.adapters.points(), ReadOptions())[0].values()
                subject.adapters.install(NAME, checkpoint)
            subject.model.requires_grad_(False)
            for key, tensor in _values(subject).items():
                assert_same(tensor, state[key], f"{subject.label}: {key}, loaded")
            assert_same(subject.bits(), expected, f"{subject.label}: the output of the loaded adapter")

    def test_observed_is_the_base(self) -> None:
        """Inside `observing` the output is the base's, bit for bit, and a backward leaves nothing behind."""
        observed = False
        for subject in self.subjects(fresh=True):
            expected, before = subject.bits(None), _anatomy(subject.model)
            try:
                with subject.adapters.observing(NAME):
                    found = subject()
                    assert_same(found.detach(), expected, f"{subject.label}: the output that is observed")
                    if found.requires_grad:
                        scalar(found).backward()
                    observed = True
            except (IncompatibleTargetError, ConfigError):  # nothing to see there, or too little
                pass
            assert _anatomy(subject.model) == before, f"{subject.label}: observing left a trace"
        if not observed:
            skip("no point of the type has an input that could be seen")

    def test_the_same_trains_again(self) -> None:
        """What a type lets train when it is added trains after freezing and training again, and after loading."""
        for subject in self.subjects():
            self._require_registered()
            expected = _trains(subject)
            subject.adapters.freeze(NAME)
            assert not any(_trains(subject).values()), f"{subject.label}: something trains after freeze()"
            checkpoint = subject.adapters.checkpoint(NAME)
            for way in ("freeze() and train()", "loading"):
                subject.adapters.train(NAME)
                changed = [key for key, trains in _trains(subject).items() if trains != expected[key]]
                assert not changed, f"{subject.label}: {changed[0]} requires grad otherwise after {way}"
                subject.adapters.remove(NAME)
                subject.adapters.install(NAME, checkpoint)

    def test_an_incomplete_file_is_refused(self) -> None:
        """Without one of its tensors an adapter is refused by a MissingKeysError, and the model stays as it is."""
        for subject in self.subjects():
            self._require_registered()
            checkpoint = subject.adapters.checkpoint(NAME)
            subject.adapters.remove(NAME)
            tensors = {key: dict(own) for key, own in checkpoint.tensors.items()}
            point = next((key for key, own in tensors.items() if own), None)
            if point is None:
                continue
            tensors[point].popitem()
            attached = list(subject.adapters)
            with expecting(MissingKeysError, point, f"{subject.label}: a file without a tensor of {point} was loaded"):
                subject.adapters.install(NAME, checkpoint.replace(tensors=tensors))
            assert list(subject.adapters) == attached

    def test_config_round_trip(self) -> None:
        """`from_dict(json(to_dict()))` is the config; an unknown key is a ConfigError."""
        values = json.loads(json.dumps(self.config.to_dict()))
        again = type(self.config).from_dict(values)
        assert again == self.config, f"{again!r} came back instead of {self.config!r}"
        with expecting(ConfigError, "no_such_option", "an unknown key was accepted: use AdapterConfig.from_dict"):
            type(self.config).from_dict({**values, "no_such_option": 1})

    def test_wrong_values_are_errors(self) -> None:
        """A value of the wrong type in any scalar field is a ConfigError that names the field."""
        for item in dataclasses.fields(self.config):
            wrong = _WRONG.get(item.type.__name__ if isinstance(item.type, type) else str(item.type).split(" ")[0])
            if wrong is None:
                continue
            with expecting(ConfigError, item.name, f"{item.name}={wrong!r} was accepted: annotate the field"):
                dataclasses.replace(self.config, **{item.name: wrong})

    def test_wrong_targets_are_errors(self) -> None:
        """Targets that match nothing are an error that names what there is, and leave the model as it was."""
        subject = next(iter(self.subjects()))
        try:
            wrong = dataclasses.replace(self.config, targets="no.such_role")
        except ConfigError:
            skip("the type's targets are fixed")
        role = next(iter(subject.adapters.modules(NAME))).split("@")[0]
        with expecting(AdapterKitError, role.split(".")[0], "targets that match nothing were accepted"):
            subject.adapters.add("other", wrong)
        assert "other" not in subject.adapters

    def test_copies(self) -> None:
        """`copy.deepcopy`, `pickle` and `torch.save` of an adapted model give the same bits, and share nothing."""
        for subject in self.subjects():
            expected = subject.run()
            buffer = io.BytesIO()
            torch.save(subject.model, buffer)
            buffer.seek(0)
            copies: dict[str, Any] = {
                "deepcopy": copy.deepcopy(subject.model),
                "pickle": pickle.loads(pickle.dumps(subject.model)),
                "torch.save": torch.load(buffer, weights_only=False),
            }
            for way, model in copies.items():
                other = dataclasses.replace(subject, model=model, adapters=ak.Adapters(model))
                assert_same(other(), expected, f"{subject.label}: the output after {way}")
                shared = _memory(subject.model) & _memory(model)
                assert not shared, f"{subject.label}: after {way} the copy has {len(shared)} tensors of the original"
                other.adapters.activate(None)
                assert_same(subject(), expected, f"{subject.label}: the original, where its {way} copy is switched off")
                other.adapters.detach()
                assert_same(subject(), expected, f"{subject.label}: the original, where its {way} copy is detached")

    def test_seeds(self) -> None:
        """The same seed gives the same start, whatever else was added, and no global random number is consumed."""
        for subject in self.subjects(fresh=True, seed=5):
            state = {key: tensor.clone() for key, tensor in subject.adapters.state_dict(NAME).items()}
            before = torch.get_rng_state()
            subject.adapters.add("second", subject.config, seed=5)
            assert torch.equal(torch.get_rng_state(), before), f"{subject.label}: adding drew global random numbers"
            for key, tensor in subject.adapters.state_dict("second").items():
                assert_same(tensor, state[key], f"{subject.label}: {key} from the same seed")

    def test_repr(self) -> None:
        """`repr(model)` shows the adapter's modules, and the report its size."""
        subject = next(iter(self.subjects()))
        shown, module = repr(subject.model), next(iter(subject.adapters.modules(NAME).values()))
        assert type(module).__name__ in shown, f"repr(model) does not show {type(module).__name__}"
        count = sum(parameter.numel() for parameter in subject.adapters.parameters(NAME))
        assert f"{count:,}" in str(subject.adapters.report()), "the report does not show the number of parameters"

    def test_the_entry_module_is_light(self) -> None:
        """Importing the module that registers the type imports no torch: it is imported whenever adapterkit starts."""
        spec = self._require_registered()
        module = _entry_module(spec.origin)
        if not module:
            skip("the type was registered by a running program, or comes with adapterkit")
        code = f"import sys, importlib; importlib.import_module({module!r}); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1:] or ["it imports torch; name the type by a string in its spec"]
        assert done.returncode == 0, f"importing {module}: {last[0]}"

    def test_spec(self) -> None:
        """The registered spec leads to this type, and tells its kinds."""
        spec = self._require_registered()
        assert spec.load() is type(self.config), f"{spec.name} leads to {spec.load().__name__}"
        missing = set(self.config.kinds) - set(spec.kinds)
        assert not missing, f"the spec of {spec.name} does not tell of {', '.join(sorted(missing))} points"
        assert spec.summary, f"the spec of {spec.name} has no summary"


def _entry_module(origin: Origin | None) -> str:
    """The module that an installed plug-in's entry point names."""
    if origin is None or origin.distribution in ("", "adapterkit"):
        return ""
    entries = metadata.distribution(origin.distribution).entry_points.select(group="adapterkit", name=origin.plugin)
    return next((entry.module for entry in entries), "")


def _values(subject: Subject) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in subject.adapters.state_dict(NAME).items()}


def _trains(subject: Subject) -> dict[str, bool]:
    modules = subject.adapters.modules(NAME).items()
    return {f"{key}/{name}": p.requires_grad for key, module in modules for name, p in module.named_parameters()}


def _memory(model: nn.Module) -> set[int]:
    """Where the tensors of a model lie: parameters, buffers, and what modules keep beside them."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *kept]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def _anatomy(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "state": list(model.state_dict()),
        "trains": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
    }
