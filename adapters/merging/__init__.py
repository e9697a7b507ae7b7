"""Several adapters, or an adapter and its base: merging, combining, measuring."""
