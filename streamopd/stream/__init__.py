"""Durable streams between processes: the only package that knows Redis."""

from .broker import BatchEntry, Broker, Counters, Entry, Finished, HandOff, Limits

__all__ = ["BatchEntry", "Broker", "Counters", "Entry", "Finished", "HandOff", "Limits"]
