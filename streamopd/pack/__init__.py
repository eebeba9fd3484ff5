"""Which groups are worth a step, and how a step is closed. Pure; evidence itself is checked by `score.check`."""
