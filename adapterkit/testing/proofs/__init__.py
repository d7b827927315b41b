"""What a proof by numbers checks, one kind of point a file."""
