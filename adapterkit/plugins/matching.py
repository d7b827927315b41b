"""Which backend speaks for a model: the names of its classes are compared, so that nothing needs to be imported."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.errors import AmbiguousBackendError, UnsupportedModelError, near_matches
from adapterkit.specs import BackendSpec

# torch's wrappers, and the attribute that holds the model which each wraps.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


# What PEFT puts around a model, and around its layers.
_PEFT = ("peft:PeftModel", "peft:BaseTuner", "peft:BaseTunerLayer")


def peel(model: object) -> object:
    """The model inside the wrappers of `torch.compile`, DataParallel and DistributedDataParallel."""
    while (attribute := _wrapped_attribute(type(model))) is not None:
        model = getattr(model, attribute)
    return model


def _wrapped_attribute(cls: type) -> str | None:
    for base in cls.__mro__:
        if _root(base) == "torch" and base.__name__ in _WRAPPERS:
            return _WRAPPERS[base.__name__]
    return None


def foreign(cls: type) -> str | None:
    """Why adapters cannot be put in a model that has modules of this class inside, and how to mend it; or None."""
    keys = class_keys(cls)
    if "torch:FullyShardedDataParallel" in keys:
        return (
            "FullyShardedDataParallel has flattened the parameters. Add adapters first, and then shard with "
            "torch.distributed.fsdp.fully_shard, which leaves parameters apart"
        )
    if any(key in keys for key in _PEFT):
        return (
            f"PEFT has put its {cls.__name__}. Take the base back first: model = model.unload() "
            "(or merge_and_unload()); a diffusers pipeline: pipe.unload_lora_weights()"
        )
    if _wrapped_attribute(cls) is not None:
        return f"there is a {cls.__name__} around a part. Add adapters to the model first, then wrap its parts"
    return None


def match(model: object, backends: Mapping[str, BackendSpec], hint: str = "") -> BackendSpec:
    """The backend that claims the most derived class of `model`.

    Args:
        model: A model, already peeled.
        backends: The backends to choose from.
        hint: A sentence to add to the error for a model that nobody claims.

    Raises:
        AmbiguousBackendError: Several backends claim the same class.
        UnsupportedModelError: None claims any of the model's classes.
    """
    for key in class_keys(type(model)):
        claims = [spec for spec in backends.values() if key in spec.models]
        if len(claims) == 1:
            return claims[0]
        if claims:
            names = " and ".join(str(spec) for spec in claims)
            raise AmbiguousBackendError(f"{key} is claimed by {names}. Choose one with backend={claims[0].name!r}.")
    raise UnsupportedModelError(_unsupported(type(model), backends, hint))


def class_keys(cls: type) -> list[str]:
    """`"package:Class"` of a class and its bases, most derived first."""
    return [f"{_root(base)}:{base.__name__}" for base in cls.__mro__]


def _unsupported(cls: type, backends: Mapping[str, BackendSpec], hint: str) -> str:
    families = "; ".join(f"{spec.name}: {', '.join(spec.models)}" for spec in backends.values()) or "none"
    known = [model.partition(":")[2] for spec in backends.values() for model in spec.models]
    close = near_matches(cls.__name__, known)
    near = f" Similar: {', '.join(close)}." if close else ""
    return (
        f"no backend knows {cls.__module__}.{cls.__qualname__}.{near} Supported families: {families}. "
        f"Pass backend=... to use one anyway, or install a plug-in that provides this family. {hint}"
    ).rstrip()


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]
