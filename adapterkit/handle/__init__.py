"""The verbs: what a user does with the adapters on a model."""

from adapterkit.handle.adapters import Adapters

__all__ = ["Adapters"]
