"""One adapter on disk: finding, reading, checking, exporting and describing it."""
