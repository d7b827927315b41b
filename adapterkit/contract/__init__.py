"""The pieces of the public contract, one a file; what third parties derive from and are given."""
