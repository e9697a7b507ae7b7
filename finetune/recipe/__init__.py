"""Recipes: the schema of a run, and the YAML file that holds it."""
