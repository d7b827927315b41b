"""What runs inside a forward of an adapted model."""
