"""Answers by the student: a batched decode whose weights may change between two tokens."""
