"""One training step: the UNet's input, its loss, its optimizer."""
