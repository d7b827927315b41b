"""Modules made again from one that is there."""

from __future__ import annotations

from torch import nn

from adapterkit.engine.moulds import Mould, begin


class Made(nn.Module):
    """What is begun in our way."""

    def __init__(self, **attributes: object) -> None:
        begin(self, **attributes)


def test_a_module_begins_as_torchs_own_does() -> None:
    expected, first, second = vars(nn.Module()), Made(size=3, training=False), Made()
    assert vars(first).keys() == expected.keys() | {"size"}
    assert {**vars(first), "training": True} == {**expected, "size": 3}
    assert {key: type(value) for key, value in vars(second).items()} == {k: type(v) for k, v in expected.items()}
    containers = [key for key, value in expected.items() if isinstance(value, (dict, list, set))]
    assert containers
    assert not [key for key in containers if vars(first)[key] is vars(second)[key]]


def test_a_begun_module_takes_children_and_hooks_that_no_other_has() -> None:
    first, second = Made(), Made()
    first.child, first.weight = nn.Linear(1, 1), nn.Parameter(nn.Linear(1, 1).weight.detach())
    first.register_forward_hook(lambda *_: None)
    assert [*dict(first.named_modules())] == ["", "child"]
    assert not second._modules
    assert not second._parameters
    assert not second._forward_hooks


def test_what_is_cast_has_containers_and_children_of_its_own() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    module.eval().names = ["a"]  # type: ignore[assignment]
    cast = Mould.of(module).cast()
    assert repr(cast) == repr(module)
    assert not cast.training
    assert cast.names == ["a"]
    assert cast.names is not module.names
    assert not {id(one) for one in cast.modules()} & {id(one) for one in module.modules()}
