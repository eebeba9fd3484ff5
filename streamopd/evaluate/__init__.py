"""Is it better? Held-out answers graded, and how far student and teacher are apart, before and after."""
