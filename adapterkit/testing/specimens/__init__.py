"""Shrunk random copies of models, with inputs: what a proof by numbers runs."""

from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, specimen, strengthened

__all__ = ["NoSpecimen", "Specimen", "specimen", "strengthened"]
