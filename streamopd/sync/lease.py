"""Who reads a folder keeps it. The kernel drops a lease with its process, so a SIGKILL frees it too.

A lease is a shared `flock` on the folder's manifest; deletion needs the exclusive one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


@contextmanager
def read_lease(folder: Path) -> Iterator[None]:
    """Keep `folder` from deletion inside the block; FileNotFoundError when it is gone already."""
    with (folder / MANIFEST).open("rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        _require_linked(folder, manifest.fileno())
        yield


def delete_unread(folder: Path) -> bool:
    """Delete `folder` unless somebody holds a lease on it; whether it is gone."""
    try:
        manifest = (folder / MANIFEST).open("rb")
    except FileNotFoundError:  # never finished, so nobody reads it
        shutil.rmtree(folder, ignore_errors=True)
        return True
    with manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True


def _require_linked(folder: Path, held: int) -> None:
    """The writer may have deleted or replaced the folder between our open and our lock."""
    there, here = os.stat(folder / MANIFEST), os.fstat(held)
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        raise FileNotFoundError(f"{folder} was replaced while it was being opened")
