"""Estimates of the memory that a run takes, and settings that fit a card."""
