"""The attention seam of transformers models: keys and values are extended after the rotary embedding and the cache.

Adapters with an attention of their own are asked after the model's attention has run.

Attention modules of transformers look their attention function up by name, `config._attn_implementation`, in the
`AttentionInterface` registry. The seam gives one module a view of its config that differs in that name alone; the
function behind the name extends keys and values and calls the function that the real config names. The real config is
never written to: masks, caches, saved files and the other modules see nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from adapterkit.backend import AttentionSeam, Extension, extension_of
from adapterkit.errors import IncompatibleTargetError

if TYPE_CHECKING:
    from torch import Tensor, nn

IMPLEMENTATION = "adapterkit"
"""The name under which `attend` is registered with transformers."""

_SUPPORTED = ("sdpa", "eager", None)  # None is what a config says that no model has seen: transformers runs eager.


class ConfigView:
    """A config as it is at any moment, later changes included, but for the name of the attention implementation.

    Args:
        config: The attention module's own config. Everything read or written here goes there.
        file: The module that holds the attention class, with the registry and the eager function that it uses.
    """

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any, file: ModuleType) -> None:
        file.ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
        self.__dict__.update(_config=config, _file=file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the initialiser, so that a process which unpickles an adapted model registers `attend` too.
        return _view, (self._config, self._file.__name__)

    def original(self, module: nn.Module) -> Callable[..., Any]:
        """The attention function that `module` would run without the view."""
        implementation = self._config._attn_implementation
        if implementation not in ("eager", None):
            return self._file.ALL_ATTENTION_FUNCTIONS[implementation]
        # GPT-2 asks its config for "eager" by name before it takes this path, and is shown another name.
        return _upcast if getattr(module, "reorder_and_upcast_attn", False) else self._file.eager_attention_forward


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The original attention over keys and values that the active adapters have extended, and theirs beside it.

    Args:
        module: The attention module, whose config is a `ConfigView`.
        query: [batch, heads, queries, head_dim].
        key: [batch, kv_heads, length, head_dim], as the cache gave them back.
        value: Like `key`; another width where latent attention gives it one.
        attention_mask: Broadcastable to [batch, heads, queries, length], boolean or additive, or None.
        **kwargs: What the original takes.

    Raises:
        IncompatibleTargetError: An adapter is active and the implementation was changed to one that cannot be extended.
    """
    view: ConfigView = module.config  # pyright: ignore[reportAssignmentType]
    extension = extension_of(module)
    given = key, value
    if extension is not None:
        queries = query.shape[2]
        causal = attention_mask is None and _guesses_causal(module, view, queries, kwargs)
        keys, value, attention_mask = extension.extend(key, value, attention_mask, queries=queries, causal=causal)
        if keys is not key:
            if objection := _objection(view, kwargs):
                raise IncompatibleTargetError(f"{type(module).__name__} cannot be extended: {objection}")
            if causal:  # the mask says so now; asked for both, transformers 4 would align its own to the wrong corner
                kwargs["is_causal"] = False
            if kwargs.get("position_bias") is not None:  # T5's, which is added to the logits
                added = keys.shape[2] - key.shape[2]
                kwargs["position_bias"] = _longer_bias(module, kwargs["position_bias"], added, extension)
        key = keys
    scale = kwargs.get("scaling")
    result = view.original(module)(_shown(module, view), query, key, value, attention_mask, **kwargs)
    if extension is None:
        return result
    output = result[0].transpose(1, 2)
    attended = extension.attend(query, *given, output, scale=scale)
    return result if attended is output else (attended.transpose(1, 2).contiguous(), *result[1:])


def _longer_bias(module: Any, bias: Tensor, added: int, extension: Extension) -> Tensor:
    """A relative position bias [1, heads, queries, keys] for `added` more keys in front.

    Those have none; or, where they count, the keys behind them move back, and queries keep their numbers, or where
    padding counts move too. One layer has the table, and hands what it made to those behind it.
    """
    if not extension.counted:
        return F.pad(bias, (added, 0))
    if module.has_relative_attention_bias:
        queries, keys = bias.shape[-2:]
        places = keys + added if extension.padded else keys
        every = module.compute_bias(places, keys + added, device=bias.device)
        bias.longer = every[:, :, places - queries :].to(bias.dtype)  # type: ignore[attr-defined]
    longer = getattr(bias, "longer", None)
    if longer is None or longer.shape[-1] != bias.shape[-1] + added:
        raise IncompatibleTargetError(
            "a prefix that counts as positions needs one of its length at the first layer of the stack too, which has "
            "the table of relative positions; set counted=False"
        )
    return longer


class _Plain:
    """A module as it is without the view: the functions of other packages ask its config for their own name."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class TransformersAttentionSeam(AttentionSeam):
    """Reaches every attention module that calls its function through transformers' attention interface.

    Keys and values can be extended with 'sdpa' and 'eager'; an attention can stand beside any implementation.
    """

    def refusal(self, module: nn.Module) -> str | None:
        implementation = getattr(_own_config(module), "_attn_implementation", None)
        return self.attend_refusal(module) or (None if implementation in _SUPPORTED else _unsupported(implementation))

    def attend_refusal(self, module: nn.Module) -> str | None:
        if _own_config(module) is not None and _file_of(module) is not None:
            return None
        return (
            f"{type(module).__name__} does not call transformers' attention interface, which some models of older "
            "releases never do: pip install -U transformers"
        )

    def install(self, module: nn.Module) -> object:
        """Shows the module a view of its config. Returns the config itself."""
        config, file = _own_config(module), _file_of(module)
        if config is None or file is None:
            raise IncompatibleTargetError(self.refusal(module))
        module.config = ConfigView(config, file)  # pyright: ignore[reportArgumentType]
        return config

    def remove(self, module: nn.Module, saved: object) -> None:
        """Puts the very config object back."""
        module.config = saved  # pyright: ignore[reportArgumentType]


def _view(config: Any, file: str) -> ConfigView:
    return ConfigView(config, importlib.import_module(file))


def _upcast(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Any:
    return module._upcast_and_reordered_attn(query, key, value, mask)


def _shown(module: nn.Module, view: ConfigView) -> Any:
    """The module as the original function should see it."""
    return module if view._config._attn_implementation in _SUPPORTED else _Plain(module, view._config)


def _own_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config._config if isinstance(config, ConfigView) else config


def _file_of(module: nn.Module) -> ModuleType | None:
    """The file of the class that looks the attention function up: the first of the module's classes that has both."""
    for cls in type(module).__mro__:
        file = sys.modules.get(cls.__module__)
        if hasattr(file, "ALL_ATTENTION_FUNCTIONS") and hasattr(file, "eager_attention_forward"):
            return file
    return None


def _guesses_causal(module: nn.Module, view: ConfigView, queries: int, kwargs: dict[str, Any]) -> bool:
    """Whether the original takes a missing mask for a causal one, aligned to the upper left. Only sdpa does."""
    if view._config._attn_implementation != "sdpa" or queries == 1:
        return False
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _objection(view: ConfigView, kwargs: dict[str, Any]) -> str | None:
    """Why the call under way has no place for more keys, or None."""
    implementation = view._config._attn_implementation
    if implementation not in _SUPPORTED:
        return _unsupported(implementation)
    return "it is called with a paged cache" if kwargs.get("cache") is not None else None


def _unsupported(implementation: str) -> str:
    return (
        f"the attention implementation {implementation!r} takes no mask that fits more keys than tokens; "
        "supported are 'sdpa' and 'eager': call model.set_attn_implementation('sdpa')"
    )
