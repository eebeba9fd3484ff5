"""What the teachers think of the tokens the student wrote. `local` needs torch; `check` does not."""
