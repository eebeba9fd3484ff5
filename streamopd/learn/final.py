"""final/: the student at a run's end. Its marker says whose end, and at which step: an earlier end is not this one."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

MARKER = "streamopd.json"


class Final(Struct, frozen=True):
    """What the marker holds."""

    run: str
    n: int     # steps done = version of the weights


def mark(folder: Path, run: str, n: int) -> None:
    """Say whose weights lie in `folder`."""
    (folder / MARKER).write_bytes(msgspec.json.encode(Final(run, n)))


def unmark(folder: Path) -> None:
    """The run is taken up again: what lies in `folder` is not its end any more."""
    (folder / MARKER).unlink(missing_ok=True)


def marked_step(folder: Path, run: str) -> int | None:
    """The step whose weights `folder` holds; None when it is missing, unmarked, or of another run."""
    try:
        final = msgspec.json.decode((folder / MARKER).read_bytes(), type=Final)
    except FileNotFoundError:
        return None
    return final.n if final.run == run else None
