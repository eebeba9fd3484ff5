"""Watching a run: what is written while it goes, what is shown, and the account at the end. No torch."""
