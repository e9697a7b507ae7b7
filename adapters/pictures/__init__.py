"""Pictures as files: reading, contact sheets, the texts in a PNG."""
