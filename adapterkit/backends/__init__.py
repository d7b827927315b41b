"""The model families that adapterkit knows: tables of data, and the seams of their attention."""
