"""Training on language: rows of files, conversations, tokens with what is learnt of them, batches."""
