"""A model family as data, for backends: see `adapterkit.mapping.family`."""

from adapterkit.mapping.family import *  # noqa: F403 - the very same names
from adapterkit.mapping.family import __all__ as __all__
