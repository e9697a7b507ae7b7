"""Pictures as files: reading, contact sheets, and the texts in a PNG."""
