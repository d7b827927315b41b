"""What can be done with adapters that are in files, not on a model: look, shrink, combine, extract, bake, compare."""
