"""What tests are built of: random models, adapters, runs, other tools' files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
