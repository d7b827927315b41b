"""What a run leaves for others: files of other tools, each read back and compared, and a model card."""
