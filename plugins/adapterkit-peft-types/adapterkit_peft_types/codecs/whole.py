"""Codecs of types that have no parts for some rows of a weight: they are read at whole modules."""

from __future__ import annotations

from adapterkit.contract.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit_peft_types.codecs.modules import ModuleCodec


class WholeCodec(ModuleCodec):
    """Reads at the point of the module itself, also where its rows are several points."""

    def at(self, place: Place, said: Said, context: Context) -> Said:
        """What is said, where the place is a whole module.

        Raises:
            CheckpointError: It is a part of one.
        """
        if place.whole:
            return said
        told = f"{self.peft_type} acts on all of {place.point.path}, of which the model at hand has parts alone"
        raise CheckpointError(f"{told}: it cannot be said of a part", context.where, place.point.id)
