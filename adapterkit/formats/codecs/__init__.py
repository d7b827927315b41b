"""How built-in adapter types are written, one type and dialect a file."""
