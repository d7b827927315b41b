"""Gates over frozen adapters."""
