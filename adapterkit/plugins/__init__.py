"""Which plug-in provides what: the manager, and how plug-ins are found and models matched. Torch-free."""

from adapterkit.plugins.manager import PluginManager, get_plugin_manager

__all__ = ["PluginManager", "get_plugin_manager"]
