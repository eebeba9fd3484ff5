"""The one authority: what is on the disk. Lineages say who may write; a checkpoint is whole or is not there.

    state/lineage-3/            granted to one learner life, by an exclusive mkdir
    state/ckpt-3-120/           trainer.safetensors, checkpoint.json: the state after 120 steps, written under lineage 3
    state/.tmp-3-140-…/         being written; never read
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import xxhash
from msgspec import Struct
from safetensors import SafetensorError

from streamopd.errors import UserError

KEPT = 2
RECORD_FILE = "checkpoint.json"
_LINEAGE = re.compile(r"lineage-(\d+)")
_CHECKPOINT = re.compile(r"ckpt-(\d+)-(\d+)")
_PARTIAL = re.compile(r"\.tmp-(\d+)-.*")


class Checkpoint(Struct, frozen=True, kw_only=True):
    """What a learner knows at n, beside its weights. `fed` = len(record) + len(unused) once `done`."""

    boot: str                   # the broker's life whose batches it consumed
    lineage: int
    n: int                      # steps done = version of the weights
    record: dict[int, str]      # seq -> fate: all that was consumed, and so never comes again
    dataset_digest: str
    method_digest: str
    done: bool = False
    unused: list[int] = []      # issued without a fate when the run ended; a resumed run issues them again
    fed: int = 0


class Saved(Struct, frozen=True):
    """checkpoint.json: the checkpoint, and what the other files must be."""

    checkpoint: Checkpoint
    files: dict[str, str]       # name -> xxh3-128 of its bytes


class Found(Struct, frozen=True):
    """The newest readable checkpoint; `warnings` tell of newer ones that were not."""

    checkpoint: Checkpoint
    folder: Path
    warnings: list[str] = []


class Savable(Protocol):
    """What has a state worth keeping: the trainer."""

    @property
    def nbytes(self) -> int:
        """Size of what `save` writes, roughly, before it does."""

    def save(self, folder: Path) -> None:
        """Write files into an empty folder."""


# ---------------------------------------------------------------- lineages
def grant_lineage(state_dir: Path) -> int:
    """A number higher than any before, to one caller only."""
    state_dir.mkdir(parents=True, exist_ok=True)
    while True:
        mine = newest_lineage(state_dir) + 1
        try:
            (state_dir / f"lineage-{mine}").mkdir()
        except FileExistsError:  # another learner was faster
            continue
        _sync_folder(state_dir)
        return mine


def newest_lineage(state_dir: Path) -> int:
    """The highest granted number; 0: none. A learner that finds more than its own must leave."""
    if not state_dir.is_dir():
        return 0
    return max((int(m[1]) for m in (_LINEAGE.fullmatch(path.name) for path in state_dir.iterdir()) if m), default=0)


# ---------------------------------------------------------------- saving
def save(state_dir: Path, checkpoint: Checkpoint, trainer: Savable) -> Path:
    """Write, sync, then rename: the folder's name appears only when all of it is on the disk. The last two are kept.

    Saving the same (lineage, n) again replaces the record and keeps the weights, which are the same.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    target = state_dir / f"ckpt-{checkpoint.lineage}-{checkpoint.n}"
    partial = state_dir / f".tmp-{checkpoint.lineage}-{checkpoint.n}-{os.getpid()}"
    _drop_partials(state_dir, checkpoint.lineage)
    if target.is_dir():
        _replace_record(target, checkpoint)
        return target
    _refuse_without_room(state_dir, trainer.nbytes)
    try:
        _write(partial, checkpoint, trainer)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(_no_room(state_dir, trainer.nbytes, str(error))) from error
    _sync_folder(state_dir)
    _drop_old(state_dir)
    return target


def _write(partial: Path, checkpoint: Checkpoint, trainer: Savable) -> None:
    partial.mkdir()
    trainer.save(partial)
    files = {file.name: _digest(file) for file in partial.iterdir()}
    for name in files:
        _sync_file(partial / name)
    _write_synced(partial / RECORD_FILE, msgspec.json.encode(Saved(checkpoint, files)))
    _sync_folder(partial)


def _replace_record(target: Path, checkpoint: Checkpoint) -> None:
    saved = _read_record(target)
    fresh = target / f".{RECORD_FILE}"
    _write_synced(fresh, msgspec.json.encode(Saved(checkpoint, saved.files)))
    fresh.replace(target / RECORD_FILE)
    _sync_folder(target)


def _refuse_without_room(state_dir: Path, needed: int) -> None:
    if shutil.disk_usage(state_dir).free < needed:
        raise UserError(_no_room(state_dir, needed, "the disk is full"))


def _no_room(state_dir: Path, needed: int, why: str) -> str:
    free = shutil.disk_usage(state_dir).free
    return (
        f"No checkpoint could be written to {state_dir} ({why}): it needs {needed:,} bytes, {free:,} are free. "
        "Make room and start again; the checkpoint before this one is untouched."
    )


def _drop_old(state_dir: Path) -> None:
    for folder in _newest_first(state_dir)[KEPT:]:
        gone = state_dir / f".tmp-0-{folder.name}"  # a half-deleted checkpoint must not look like one
        folder.rename(gone)
        shutil.rmtree(gone)


def _drop_partials(state_dir: Path, lineage: int) -> None:
    """What earlier lives left half-written; a fenced one still writing fails, which it should."""
    for path in state_dir.iterdir():
        found = _PARTIAL.fullmatch(path.name)
        if found and int(found[1]) <= lineage:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- loading
def load_newest(state_dir: Path) -> Found | None:
    """The newest readable checkpoint by (lineage, n), never by time; None when there never was one."""
    warnings: list[str] = []
    folders = _newest_first(state_dir)
    for folder in folders:
        try:
            return Found(_verified(folder), folder, warnings)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            warnings.append(f"Checkpoint {folder} cannot be read ({error}); going back to the one before it.")
    if folders:
        raise UserError(
            f"None of the {len(folders)} checkpoints in {state_dir} can be read: {' '.join(warnings)} "
            "Restore one, or start a new run folder."
        )
    return None


def _verified(folder: Path) -> Checkpoint:
    saved = _read_record(folder)
    for name, digest in saved.files.items():
        found = _digest(folder / name)
        if found != digest:
            raise ValueError(f"{name} has digest {found}, its record says {digest}")
    return saved.checkpoint


def _read_record(folder: Path) -> Saved:
    return msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=Saved)


def _newest_first(state_dir: Path) -> list[Path]:
    return [folder for _, folder in sorted(_numbered(state_dir), reverse=True)]


def _numbered(state_dir: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    for path in state_dir.iterdir() if state_dir.is_dir() else ():
        found = _CHECKPOINT.fullmatch(path.name)
        if found:
            yield (int(found[1]), int(found[2])), path


# ---------------------------------------------------------------- bytes
def _digest(file: Path) -> str:
    state = xxhash.xxh3_128()
    with file.open("rb") as body:
        while block := body.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _write_synced(file: Path, body: bytes) -> None:
    with file.open("wb") as out:
        out.write(body)
        out.flush()
        os.fsync(out.fileno())


def _sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
