"""streamopd: asynchronous on-policy distillation as a stream."""

__version__ = "0.1.0"
