"""One adapter on disk: where it is, reading, checking, exporting, describing."""
