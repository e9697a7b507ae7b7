"""The model below an adapter: where it is, what it holds, what guards it."""
