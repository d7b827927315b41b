"""How pipelines are trained, one family a file."""
