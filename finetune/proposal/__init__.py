"""A recipe to start from, for a folder of pictures."""
