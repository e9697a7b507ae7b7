"""Scores of what a run learnt, and pictures of the base and the fine-tuned cascade."""
