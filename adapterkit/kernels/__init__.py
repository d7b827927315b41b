"""Arithmetic on weights and spans, below the adapter types."""
