"""Large payloads lie beside the stream: files on a shared volume, named by what they are, trusted by digest and size.

Redis is disposable, so nothing is fsynced here: a blob that is missing after a crash is a problem of its entry, and the
group is issued again. A file is garbage when its batch is below a checkpoint, its seq in a checkpoint's record, or its
attempt of another boot.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Collection
from pathlib import Path

from streamopd.errors import StreamError
from streamopd.topology import Stage

NAME = re.compile(r"(?P<boot>\w+)\.(?P<k>\d+)-(?P<stage>[1-4])-(?P<number>\d+)-[0-9a-f]{32}-[0-9a-f]{8}")


class BlobFolder:
    """The payload files of one run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder

    def write(self, attempt: str, stage: Stage, number: int, digest: str, body: bytes) -> str:
        """Keep `body` of group (or batch) `number`; the name for its entry. Each call makes a file of its own."""
        name = f"{attempt}-{int(stage)}-{number}-{digest}-{secrets.token_hex(4)}"
        part = self.folder / f".{name}"
        try:
            part.write_bytes(body)
            part.rename(self.folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StreamError(self._refusal(error, len(body))) from error
        return name

    def read(self, name: str, max_bytes: int) -> bytes:
        """The payload; ValueError says why there is none to trust."""
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not the name of a payload")
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise ValueError(f"payload {name} cannot be opened: {error.strerror}") from None
        with open(handle, "rb") as file:
            return file.read(max_bytes + 1)

    def remove(self, *names: str) -> None:
        """Forget payloads whose entries are gone."""
        for name in filter(NAME.fullmatch, names):
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self, boot: str, committed: int = 0, seqs: Collection[int] = ()) -> int:
        """Remove what is garbage now that batches below `committed` and groups `seqs` are in a checkpoint; how many."""
        garbage = [file for file in self.folder.iterdir() if self._is_garbage(file.name, boot, committed, seqs)]
        for file in garbage:
            file.unlink(missing_ok=True)
        return len(garbage)

    @staticmethod
    def _is_garbage(name: str, boot: str, committed: int, seqs: Collection[int]) -> bool:
        parts = NAME.fullmatch(name.removeprefix("."))
        if not parts:
            return False
        number = int(parts["number"])
        finished = number < committed if parts["stage"] == "4" else number in seqs
        return parts["boot"] != boot or finished

    def _refusal(self, error: OSError, nbytes: int) -> str:
        if error.errno != errno.ENOSPC:
            return f"A payload of {nbytes:,} bytes cannot be written to {self.folder}: {error.strerror}."
        disk = os.statvfs(self.folder)
        return (
            f"{self.folder} is full: a payload needs {nbytes:,} bytes and {disk.f_bavail * disk.f_frsize:,} are free. "
            "Free some space, or lower stream.cap_mb."
        )
