"""Training data: sources, pictures, encoded captions, class pictures, batches."""
