"""Training of embeddings: texts that belong together become alike."""
