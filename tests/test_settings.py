"""Points and their settings as data: `AdapterConfig.settings`, `Adapters.add(..., settings=)` and the native file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import (
    BaseMismatchError,
    ConfigError,
    IncompatibleTargetError,
    InvalidHeaderError,
    MissingKeysError,
    TargetNotFoundError,
    UnexpectedKeysError,
)
from adapterkit.points import InjectionPoint
from adapterkit.testing import toys
from tests.formats import forge

Q, V, UP = "attn.q@toy.0", "attn.v@toy.1", "mlp.up@toy.0"
SETTINGS: dict[str, dict[str, Any]] = {Q: {"rank": 1, "alpha": 3.0}, V: {}, UP: {"rank": 4}}


@pytest.fixture
def adapters() -> ak.Adapters:
    toys.register()
    return ak.Adapters(toys.ToyModel())


def shake(adapters: ak.Adapters, name: str) -> None:
    for number, parameter in enumerate(adapters.parameters(name)):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def output(adapters: ak.Adapters, name: str) -> Tensor:
    adapters.activate(name)
    model: Any = adapters._mapped.components["toy"].root
    with torch.no_grad():
        return model(toys.ids())


def test_the_points_are_those_of_the_settings_and_each_has_its_own(adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=2, alpha=1.0, targets="nothing.here"), settings=SETTINGS)
    modules: dict[str, Any] = adapters.modules("a")
    assert {key: (len(m.A), m.scale) for key, m in modules.items()} == {Q: (1, 3.0), V: (2, 0.5), UP: (4, 0.25)}
    config: Any = adapters.config("a")
    points = {point.id: point for point in adapters.points()}
    assert {key: config.rank_at(points[key]) for key in SETTINGS} == {Q: 1, V: 2, UP: 4}
    assert {key: config.scale_at(points[key]) for key in SETTINGS} == {Q: 3.0, V: 0.5, UP: 0.25}


def test_settings_act_as_selectors_that_say_the_same(adapters: ak.Adapters) -> None:
    written = ak.LoRA(rank=2, targets="attn.q@layer=0 attn.v@layer=1 mlp.up@layer=0", ranks={"attn.q": 1, "mlp.*": 4})
    adapters.add("selectors", dataclasses.replace(written, alphas={"attn.q": 3.0}))
    adapters.add("data", ak.LoRA(rank=2), settings=SETTINGS)
    for name in ("selectors", "data"):
        shake(adapters, name)
    assert adapters.state_dict("selectors").keys() == adapters.state_dict("data").keys()
    assert torch.equal(output(adapters, "selectors"), output(adapters, "data"))


def test_a_points_own_rank_stands_above_ranks_by_selector(adapters: ak.Adapters) -> None:
    config = ak.LoRA(rank=2, ranks={"*": 3}, alphas={"*": 6.0}, settings={Q: {"rank": 1}, V: {"alpha": 9.0}})
    adapters.add("a", config)
    modules: dict[str, Any] = adapters.modules("a")
    assert {key: (len(m.A), m.scale) for key, m in modules.items()} == {Q: (1, 6.0), V: (3, 3.0)}


@pytest.mark.parametrize("bundled", [False, True])
def test_a_file_keeps_them_bit_for_bit(adapters: ak.Adapters, tmp_path: Path, bundled: bool) -> None:
    adapters.add("a", ak.LoRA(rank=2), settings=SETTINGS)
    shake(adapters, "a")
    before, kept = output(adapters, "a"), adapters.state_dict("a")
    path = adapters.save(["a"] if bundled else "a", tmp_path / "a.safetensors")
    assert adapters.checkpoint("a").settings == SETTINGS
    other = ak.Adapters(toys.ToyModel())
    other.load_all(path)
    assert other.config("a") == adapters.config("a")
    assert {key: tensor.tolist() for key, tensor in other.state_dict("a").items()} == {
        key: tensor.tolist() for key, tensor in kept.items()
    }
    assert torch.equal(output(other, "a"), before)
    again = other.save(["a"] if bundled else "a", tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_files_without_settings_have_no_such_part(adapters: ak.Adapters, tmp_path: Path) -> None:
    adapters.add("a", ak.LoRA(rank=2))
    assert "settings" not in forge.native_header(adapters.save("a", tmp_path / "a").read_bytes())
    assert "settings" not in ak.LoRA().to_dict()


def test_a_config_with_settings_is_json() -> None:
    config = ak.LoRA(rank=2, settings=SETTINGS)
    assert ak.LoRA.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != ak.LoRA(rank=2)
    assert config.at(UP) == ak.LoRA(rank=4)
    assert config.at("nowhere") == ak.LoRA(rank=2)
    assert config.at(UP).at(UP) is config.at(UP)
    assert ak.LoRA().at(UP) == ak.LoRA()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": ([Q], ConfigError, "settings must map point ids to fields"),
    "no fields": ({Q: [2]}, ConfigError, r"settings\['attn.q@toy.0'\]: must map fields to values"),
    "unknown field": ({Q: {"ranc": 2}}, ConfigError, "no point has 'ranc' for itself; known: rank, alpha"),
    "targets": ({Q: {"targets": "all"}}, ConfigError, "no point has 'targets' for itself"),
    "wrong value": ({Q: {"rank": 0}, V: {"rank": "x"}}, ConfigError, r"rank must be .*0.*attn.v@toy.1.*'x'"),
    "unknown point": ({"attn.q@toy.9": {}}, TargetNotFoundError, r"ToyModel has not: attn.q@toy.9.*Did you mean"),
    "another kind": ({Q: {}, "attn@toy.0": {}}, IncompatibleTargetError, "LoRA acts at weight points"),
    "own refusal": ({Q: {}, UP: {"init": "pissa", "rank": 9}}, IncompatibleTargetError, "which has 8, and 9"),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_does_not_fit_is_named_and_changes_nothing(adapters: ak.Adapters, key: str) -> None:
    settings, expected, words = WRONG[key]
    with pytest.raises(expected, match=f"(?s){words}"):
        adapters.add("a", ak.LoRA(), settings=settings)
    assert not list(adapters)


def test_a_type_that_leaves_points_out_cannot_be_given_them(adapters: ak.Adapters) -> None:
    with pytest.raises(IncompatibleTargetError, match=r"1 of the 2 points that settings name do not concern.*mlp.down"):
        adapters.add("a", ak.Trainable(part="bias"), settings={"mlp.up@toy.0": {}, "mlp.down@toy.0": {}})


FORGED: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([], InvalidHeaderError, "settings"),
    "no object": ({Q: 3}, InvalidHeaderError, f"settings.{Q}"),
    "no tensors": ({**SETTINGS, "attn.k@toy.0": {}}, InvalidHeaderError, "names a point without tensors"),
    "a lacking point": ({Q: SETTINGS[Q], UP: SETTINGS[UP]}, UnexpectedKeysError, V),
    "another rank": ({**SETTINGS, V: {"rank": 3}}, Exception, V),
    "unknown field": ({**SETTINGS, V: {"ranc": 3}}, InvalidHeaderError, "ranc"),
    "long": ({**SETTINGS, V: {"init": "x" * (1 << 17)}}, InvalidHeaderError, "longer"),
    "by selector": ({}, BaseMismatchError, "nothing.here"),
}


@pytest.mark.parametrize("key", FORGED)
def test_forged_settings_are_refused(adapters: ak.Adapters, tmp_path: Path, key: str) -> None:
    settings, expected, words = FORGED[key]
    adapters.add("a", ak.LoRA(rank=2, targets="nothing.here"), settings=SETTINGS)
    path = adapters.save("a", tmp_path / "a")
    forge.header(path, lambda header: header["adapters"][""]["parts"][0].update(settings=settings))
    with pytest.raises(expected) as caught:
        adapters.load(path, "new")
    assert words in str(caught.value)
    assert list(adapters) == ["a"]


def test_a_checkpoint_that_lacks_tensors_of_a_point(adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=2), settings=SETTINGS)
    checkpoint = adapters.checkpoint("a")
    part = checkpoint.replace(tensors={k: t for k, t in checkpoint.tensors.items() if k != V})
    with pytest.raises(MissingKeysError, match=V):
        adapters.install("b", part)


@dataclass(frozen=True)
class Scaled(ak.AdapterConfig):
    """A third party's type, which knows nothing of settings."""

    kinds: ClassVar[frozenset[Any]] = frozenset({"weight"})
    targets: str = "attn.*"
    width: int = 2
    speed: float = 1.0
    limit: float = 9.0
    shape: tuple[int, ...] = (1,)

    def accepts(self, point: InjectionPoint) -> str | None:
        return "too wide" if self.width > 5 else super().accepts(point)

    def build(self, point: InjectionPoint) -> ak.AdapterModule:
        return ScaledModule(self)

    def rate(self, parameter: str, point: InjectionPoint) -> float:
        return self.speed

    def after_step(self, modules: Mapping[str, ak.AdapterModule], step: int, steps: int) -> None:
        for key, module in modules.items():
            for parameter in module.parameters():
                parameter.clamp_(max=self.at(key).limit)


class ScaledModule(ak.AdditiveModule):
    def __init__(self, config: Scaled) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((config.width, *config.shape), 7.0))

    def delta(self, x: Tensor) -> Tensor:
        return 0 * x.sum() + 0 * self.gain.sum()


def test_every_type_has_them_without_a_line_of_its_own(adapters: ak.Adapters) -> None:
    settings = {Q: {"width": 4, "speed": 3.0, "shape": [2, 1]}, V: {"limit": 1.0}}
    config = Scaled(settings=settings)
    costs = ak.points(adapters._mapped.components["toy"].root, adapter=config).costs
    assert costs == {Q: 8, V: 2}
    adapters.add("a", config)
    modules: dict[str, Any] = adapters.modules("a")
    assert {key: tuple(module.gain.shape) for key, module in modules.items()} == {Q: (4, 2, 1), V: (2, 1)}
    groups = adapters.parameter_groups(lr=0.1)
    assert sorted((round(group["lr"], 3), len(group["params"])) for group in groups) == [(0.1, 1), (0.3, 1)]
    adapters.after_step(1, 1)
    assert {key: float(module.gain.detach().max()) for key, module in modules.items()} == {Q: 7.0, V: 1.0}
    with pytest.raises(IncompatibleTargetError, match="too wide"):
        adapters.add("b", Scaled(), settings={Q: {"width": 6}})


def test_parts_of_a_union_have_settings_of_their_own(adapters: ak.Adapters, tmp_path: Path) -> None:
    parts = (ak.LoRA(rank=2, settings=SETTINGS), ak.Bottleneck(reduction=2, targets="mlp"))
    adapters.add("a", ak.Union(parts))
    shake(adapters, "a")
    assert len(adapters.state_dict("a")[f"{UP}/members.0.A"]) == 4
    path = adapters.save("a", tmp_path / "a")
    other = ak.Adapters(toys.ToyModel())
    other.load(path)
    assert torch.equal(output(other, "a"), output(adapters, "a"))
    with pytest.raises(ConfigError, match="settings are those of the parts"):
        adapters.add("b", ak.Union(parts), settings={Q: {}})


def test_eva_at_some_points_alone(adapters: ak.Adapters) -> None:
    adapters.add("a", ak.LoRA(rank=1), settings={Q: {"init": "eva"}, V: {}})
    assert adapters.config("a").observations == ak.LoRA(init="eva").observations
    assert not adapters.config("a").at(V).observations
    modules: dict[str, Any] = adapters.modules("a")
    before = {key: module.A.detach().clone() for key, module in modules.items()}
    model: Any = adapters._mapped.components["toy"].root
    with adapters.observing("a"):
        model(toys.ids())
    assert not torch.equal(modules[Q].A, before[Q])
    assert torch.equal(modules[V].A, before[V])


def test_what_all_points_share_is_no_point_s_own() -> None:
    """A point with another n than the rule of all would fail in every forward."""
    with pytest.raises(ConfigError, match="no point has 'n' for itself"):
        ak.Compacter(settings={"mlp@toy.0": {"n": 2}})
    with pytest.raises(ConfigError, match="no point has 'reduction' for itself"):
        ak.Invertible(settings={"tokens@toy": {"reduction": 4}})


def test_settings_are_by_point_id() -> None:
    with pytest.raises(ConfigError, match=r"must map point ids such as 'attn.q@language.0' to fields, not 5"):
        ak.LoRA(settings={5: {}})  # type: ignore[dict-item]
