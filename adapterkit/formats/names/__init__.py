"""What other tools call the modules of models, one architecture a file."""
