"""Questions: where they come from, in which order, and how text becomes ids, once."""
