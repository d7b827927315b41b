"""The file formats that come with adapterkit, one a file."""
