"""One adapter and one weight: kinds of adapters, their updates, low-rank approximation."""
