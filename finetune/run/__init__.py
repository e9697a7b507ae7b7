"""A run on disk and on screen: the loop, the trainee, checkpoints, validation."""
