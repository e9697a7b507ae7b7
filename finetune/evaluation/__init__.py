"""Scores of what was learnt, and the picture of before and after."""
