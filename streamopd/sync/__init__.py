"""How weights travel: published as an HF folder with a manifest, swapped in place, and checked by numbers."""
