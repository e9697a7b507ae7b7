"""The model that an adapter changes: its files, its weights, its safety checker."""
