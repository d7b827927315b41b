"""How LyCORIS, kohya's scripts and the UIs write these types, one kind of file keys a file."""
