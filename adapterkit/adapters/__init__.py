"""The adapter types that come with adapterkit, one a file."""
