"""Where a module of PEFT's files acts in the model at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set

from adapterkit.contract.codec import Place
from adapterkit.contract.view import ComponentView
from adapterkit.errors import BaseMismatchError
from adapterkit.formats.modules import Module, Modules
from adapterkit.formats.peft_config import PeftConfig
from adapterkit.formats.peft_keys import Foreign
from adapterkit.formats.peft_renamed import renamed
from adapterkit.points import InjectionPoint, ParameterPoint, Points

_PACKED = "in_proj_weight"
_LAYER = ("weight", "bias")


class ModelNames:
    """The modules of a model, found by what a file of PEFT calls them.

    Args:
        points: The model's.
        config: The file's.
        modules: The file's, as it calls them.
        component: The component that the file is for; by default the one that has most of its modules.

    Raises:
        BaseMismatchError: Several components have as many.
    """

    def __init__(
        self, points: Points, config: PeftConfig, modules: Collection[Foreign], component: str | None = None
    ) -> None:
        self._config = config
        self._modules = Modules(points)
        self._renamed: dict[str, str] = {}
        self._own: Mapping[str, Sequence[Module]] = {}
        self._others: Mapping[str, Sequence[InjectionPoint]] = {}
        self.component = ""
        self._choose(points, [one.path for one in modules], component)
        self._with_rows = {self._here(one) for one in modules if one.part == "rows"}
        self._parameters = {
            f"{module.path}.{name}": (module.path, module.parameter, place)
            for modules in self._own.values()
            for module in modules
            for name, place in zip(module.points[0].parameters, _LAYER, strict=False)
            if name not in _LAYER
        }

    @property
    def notes(self) -> list[str]:
        """What was found under another name."""
        if not self._renamed:
            return []
        old, new = next(iter(self._renamed.items()))
        return [f"{len(self._renamed)} of its modules have other names here: {old!r} is {new!r}"]

    def parameter(self, path: str) -> tuple[str, str, str] | None:
        """The module's path, its weight's name, and "weight" or "bias", of a parameter that has another name."""
        return self._parameters.get(self._renamed.get(path, path))

    def pattern_path(self, foreign: Foreign) -> str:
        """What patterns of the config are matched with."""
        if foreign.part == "inner":
            return foreign.path.rpartition(".")[0]
        targets = self._config.target_parameters
        module = self._module(foreign, None) if targets else None
        return (
            f"{foreign.path}.{module.parameter}" if module is not None and _is_target(module, targets) else foreign.path
        )

    def ordered(self, modules: Mapping[Foreign, Iterable[str]]) -> Mapping[str, Set[str]]:
        """The paths of those modules that the model has, in its order, with the names that they have."""
        here: dict[str, set[str]] = {}
        for foreign, names in modules.items():
            here.setdefault(self._here(foreign), set()).update(names)
        return {path: here[path] for path in self._own if path in here}

    def behind(self, foreign: Foreign) -> bool:
        """Whether it is no module, but stands behind one: a name that nobody knows ends like a parameter's."""
        path = self._here(foreign).rpartition(".")[0]
        return bool(path) and (path in self._own or self._renamed.get(path, path) in self._own)

    def doubled(self, foreign: Foreign) -> bool:
        """Whether PEFT adds what it learns here twice: at the output projection of torch's attention."""
        around = self._own.get(self._here(foreign).rpartition(".")[0], ())
        return foreign.part == "inner" and any(module.parameter == _PACKED for module in around)

    def places(self, foreign: Foreign, shape: Sequence[int] | None) -> Sequence[Place] | None:
        """Where a module's tensors act; None where the model has no such module.

        Args:
            foreign: The module.
            shape: Of the weight that they are for, as far as they tell.
        """
        if not foreign.path:
            return [self._place(point) for points in self._others.values() for point in points]
        if module := self._module(foreign, shape):
            return [*module.places, *(self._tied(module) if foreign.part == "rows" else ())]
        if foreign.part == "rows" and (tied := self._sharing(foreign)) is not None:
            return tied
        here = self._others.get(self._here(foreign))
        return None if here is None else [self._place(point) for point in here]

    # -- finding ------------------------------------------------------------------------------------------------------

    def _choose(self, points: Points, paths: Sequence[str], component: str | None) -> None:
        others: dict[str, dict[str, list[InjectionPoint]]] = {}
        for point in points:
            if not isinstance(point, ParameterPoint):
                others.setdefault(point.model, {}).setdefault(point.path, []).append(point)
        names = dict.fromkeys([*self._modules.components, *others])
        if component is not None and component not in names:
            raise BaseMismatchError(f"there is no component {component!r}; the model has {', '.join(names)}")
        scores: dict[str, tuple[int, dict[str, str]]] = {}
        for name in names if component is None else [component]:
            known = {*self._modules.paths(name), *others.get(name, ())}
            other = renamed(paths, known)
            scores[name] = (sum(path in known for path in paths) + len(other), other)
        best = max((score for score, _ in scores.values()), default=0)
        first = [name for name, (score, _) in scores.items() if score == best]
        if best and len(first) > 1:
            told = f"its modules are those of {' and of '.join(first)}"
            raise BaseMismatchError(f"{told}; name one with component={first[0]!r}", self._config.where)
        self.component = first[0] if first else ""
        self._renamed = scores[self.component][1] if first else {}
        self._own, self._others = self._modules.paths(self.component), others.get(self.component, {})

    def _here(self, foreign: Foreign) -> str:
        return self._renamed.get(foreign.path, foreign.path)

    def _place(self, point: InjectionPoint) -> Place:
        return Place(point, point.shape, model=self._modules.model)

    def _module(self, foreign: Foreign, shape: Sequence[int] | None) -> Module | None:
        own = self._own.get(self._here(foreign), ())
        if foreign.parameter:
            return next((module for module in own if module.parameter == foreign.parameter), None)
        if len(own) < 2:
            return own[0] if own else None
        targets = self._config.target_parameters
        adapted = [module for module in own if _is_target(module, targets) or not targets]
        # The innermost is the first that the module has; earlier releases took them in the order of their names.
        orders = [[*reversed(adapted)], sorted(adapted, key=lambda module: module.parameter, reverse=True)]
        found = [order[foreign.depth] for order in orders if foreign.depth < len(order)]
        return next((one for one in found if _fits(one, shape)), found[0] if found else None)

    def _tied(self, embedding: Module) -> list[Place]:
        """Where the model reads an embedding's rows too: the projection that is tied to it, if the file has no own."""
        if not self._ties() or embedding.path != next((path for path in self._own if path in self._with_rows), ""):
            return []
        rows, width = embedding.shape[1], embedding.shape[0]
        heads = [module for module in self._of_role("head") if module.shape == (rows, width)]
        return [place for module in heads for place in module.places]

    def _sharing(self, foreign: Foreign) -> list[Place] | None:
        """Where rows of an embedding act that never runs, but lends its weight to those that do and to the head."""
        view = self._view()
        if not self._ties() or view is None or self._here(foreign) not in view.paths:
            return None
        return [place for role in ("embed.tokens", "head") for module in self._of_role(role) for place in module.places]

    def _of_role(self, role: str) -> list[Module]:
        """Modules of a role, but for those of which the file has rows."""
        found = [module for modules in self._own.values() for module in modules if module.points[0].role == role]
        return [module for module in found if module.path not in self._with_rows]

    def _view(self) -> ComponentView | None:
        model = self._modules.model
        return None if model is None else model.components.get(self.component)

    def _ties(self) -> bool:
        view = self._view()
        return view is not None and bool(view.config.get("tie_word_embeddings"))


def _is_target(module: Module, targets: Sequence[str]) -> bool:
    path = f"{module.path}.{module.parameter}"
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _fits(module: Module, shape: Sequence[int] | None) -> bool:
    return shape is None or {*shape} == {*module.shape}
