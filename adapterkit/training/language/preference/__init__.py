"""Training on preferences: of two answers one is better, or an answer is good or bad."""
