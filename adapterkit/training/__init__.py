"""Training: run files, the loop, and the tasks that turn data into a loss."""
