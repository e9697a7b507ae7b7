"""Scores of a run, and pictures of the base and the fine-tuned cascade."""
