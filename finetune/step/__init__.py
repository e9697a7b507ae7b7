"""One training step: what the UNet is shown, its loss, its optimizer."""
