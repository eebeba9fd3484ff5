"""What crosses a process border, and nothing else: msgspec records over numpy arrays. No torch, no redis."""

if __name__ != "streamopd.schemas":  # two import names would make two copies of every record class
    raise ImportError(f"import this package as 'streamopd.schemas', not as {__name__!r}")

from .array import Array
from .batch import Batch
from .evaluation import Evaluation
from .heartbeat import Event, Heartbeat
from .prompt import Prompt, Turn
from .rollout import AUTHORS, Author, Finish, Group, Outcome, Rollout, Span
from .score import Evidence, Scored
from .step import Fate, StepDone
from .topk import TopK
from .weights import TensorInfo, Weights
from .wire import decode, encode

__all__ = [
    "AUTHORS", "Array", "Author", "Batch", "Evaluation", "Event", "Evidence", "Fate", "Finish", "Group", "Heartbeat", "Outcome", "Prompt",
    "Rollout", "Scored", "Span", "StepDone", "TensorInfo", "TopK", "Turn", "Weights", "decode", "encode",
]
