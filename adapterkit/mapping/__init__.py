"""From tables and structure to injection points, and from a selector to those that an adapter is for."""
