"""The stream protocol as calls: what is atomic, what each answers. Held by `memory.py` and `redis.py` alike.

One number: batch number = step number = weight version. One life: a *boot* (nonce) is one life of the broker's content;
an attempt is "boot.k", weights are (boot, n). One authority: the disk; the broker can be rebuilt from it at any time.

Every script answers with a word or a value; "amnesia" means this broker is not the life the caller speaks of,
"closed" that the run has ended, "fenced" that a newer learner leads. Repeating any call changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from streamopd.schemas import Event, Fate, Heartbeat, Weights
from streamopd.topology import Stage

End = Literal["", "drain", "closed"]


class Limits(Struct, frozen=True):
    """The window's numbers, the same for every client of a run."""

    groups_per_step: int       # B
    max_staleness: int         # S
    cap_bytes: int = 1 << 30   # payload bytes in flight; never closes the door below B groups
    blob_bytes: int = 64 << 10
    max_record_bytes: int = 64 << 20
    convict_after: int = 3     # kills of an item that ran alone; attempts of a payload that cannot be read


class Entry(Struct, frozen=True):
    """A group held by a reader: it stays pending under the reader's name until handed on, fated or released."""

    id: str
    stage: Stage
    seq: int
    attempt: str               # "boot.k"
    min_version: int           # weights a generator must serve at least
    body: bytes                # the record; b"" when `problem`
    alone: bool = False        # killed its consumer twice: to be served by an empty replica that takes nothing else
    problem: str = ""          # why the body cannot be trusted: digest, size, a missing blob
    ref: str = ""              # name of the blob that holds the body; "" when the entry does

    @property
    def boot(self) -> str:
        return self.attempt.rpartition(".")[0]


class BatchEntry(Struct, frozen=True):
    """A closed batch. It stays pending until the checkpoint that contains it is committed."""

    id: str
    n: int
    members: tuple[tuple[int, str], ...]   # (seq, attempt)
    body: bytes
    problem: str = ""

    @property
    def boot(self) -> str:
        """The life it was closed in: a learner trains batches of its own boot only."""
        return self.members[0][1].rpartition(".")[0] if self.members else ""


class HandOff(Struct, frozen=True):
    """A held entry and the record that follows it."""

    entry: Entry
    body: bytes


class Counters(Struct, frozen=True):
    """The broker's own view of the run."""

    boot: str = ""                # "" before the first rebuild
    stamped: bool = False         # False: another server process answers than the one the boot names
    issued: int = 0
    fated: int = 0
    steps: int = 0                # batches whose fates are written
    batchno: int = 0              # the next batch to close
    end: End = ""
    again: tuple[int, ...] = ()   # seqs to issue again, in order
    depths: dict[str, int] = {}   # entries a stream, delivered or not
    pending: dict[str, int] = {}  # of these, delivered and not yet handed on
    inflight: dict[str, int] = {} # groups by stage: "issued" | "generated" | "scored" | "batched"
    bytes_inflight: int = 0
    weights_n: int = -1           # newest manifest; -1: none


class Finished(Struct, frozen=True):
    """The final account, true because every other script refuses from now on."""

    fates: dict[int, str]      # since the last commit
    unused: tuple[int, ...]    # keys of state: issued, no fate
    issued: int


class Broker(Protocol):
    """One client of one run's streams."""

    limits: Limits

    # ---- identity
    async def boot(self) -> str:
        """The boot whose content this server process really holds; "" when there is none, or after a lost tail."""
    async def durable(self) -> bool:
        """A restart of the server loses nothing (one node, appendfsync always): `lead(restamp=True)` is allowed."""
    async def counters(self) -> Counters: ...
    async def weights(self) -> Weights | None: ...
    async def close_connection(self) -> None: ...

    # ---- feeder
    async def issue(self, boot: str, prompts: Sequence[tuple[int, bytes]]) -> list[str]:
        """Issue (seq, body) in order: "done" | "already" | "full" | "closed" | "amnesia" each, up to the first "full"."""
    async def drain(self, boot: str, issued: int) -> str:
        """No more data: end = drain. "wait" unless exactly `issued` were issued and none waits to be issued again."""

    # ---- generator, teacher. `consumer` is one life of one process: a name used again would hide that it died
    async def read(
        self, stage: Stage, consumer: str, count: int, block_s: float = 0.0, empty: bool = True
    ) -> list[Entry]:
        """Up to `count` new entries, waiting at most `block_s` for the first. One marked `alone` comes by itself, and
        only to a reader that holds nothing (`empty`). A broker that is closed or awaits its stamp gives nothing."""
    async def own_pending(self, stage: Stage, consumer: str) -> list[Entry]:
        """What was delivered to this consumer and is not handed on: asked after any error and any cancelled read, before
        new entries. It also answers before a stamp and after the end, so "nothing" means nothing.
        One marked `alone` may come among others: release it unless it is all that is held."""
    async def hand(self, items: Sequence[HandOff]) -> list[str]:
        """Each entry's record to the next stage, if its state is still (attempt, an earlier stage): "done" | "already"
        each, "amnesia" for one of another boot; the guard's word stands for all. "amnesia" of the entry's own boot means
        a server that awaits its stamp: keep the entry and call again."""
    async def release(self, entries: Sequence[Entry]) -> None:
        """I cannot work on these now: back to the stream, no kill is counted."""
    async def renew(self, stage: Stage, consumer: str, ids: Sequence[str]) -> None:
        """Reset the idle clock of entries still held by this consumer."""
    async def reap(
        self, stage: Stage, consumer: str, min_idle_s: float, count: int, empty: bool = True
    ) -> list[Entry]:
        """Take entries that another holds without progress. Each is a kill: the second serves it alone, the third is `dead`."""

    # ---- anyone who holds an entry
    async def fate(self, entry: Entry, fate: Fate, reason: str = "") -> str:
        """Filtered (packer) or dead (reaper): the same compare, and it removes the state. "done" | "already"."""
    async def reissue(self, entry: Entry, reason: str) -> str:
        """Its payload cannot be used: issued again under the next attempt, or `dead` after `convict_after` attempts."""
    async def quarantine(self, source: str, reason: str, head: bytes, seq: int = -1) -> None:
        """Keep the first bytes of what cannot be trusted, with the reason."""
    async def quarantined(self, count: int = 100) -> list[dict[str, str]]: ...

    # ---- packer
    async def sweep(
        self, stage: Stage, consumer: str, known: set[str], count: int, block_s: float = 0.0
    ) -> list[Entry]:
        """Everything in the group not in `known` (ids): new, own pending, or pending under any other name."""
    async def close(self, entries: Sequence[Entry], n: int, body: bytes) -> tuple[str, list[str]]:
        """All entries into batch `n`, or none: ("done", []) | ("stale", ids acked) | ("already", []) | guard word.
        ("wait", []): too few, or `n` is not the next batch: read the counters, encode the batch anew."""

    # ---- learner
    async def lead(self, boot: str, lineage: int, restamp: bool) -> str: ...
    async def rebuild(
        self, boot: str, lineage: int, n: int, record: Mapping[int, str], manifest: Weights | None
    ) -> str:
        """Empty the run's keys and refill them from `record` (seq -> fate) under a new boot. "done" | "fenced"."""
    async def committed(self) -> tuple[int, int]:
        """(lineage, n) of the newest commit."""
    async def batch(self, n: int, consumer: str, block_s: float = 0.0) -> BatchEntry | None:
        """Batch `n`, new or pending under any name."""
    async def start_batch(self, boot: str, lineage: int, n: int) -> int:
        """Count a start of batch `n`; `step` clears it. More than 3 starts: its seqs are to be convicted. 0: not
        counted, and `step` will say why."""
    async def step(
        self, boot: str, lineage: int, n: int, manifest: Weights | None, fates: Sequence[tuple[int, str, Fate]]
    ) -> str:
        """Weights `n` and the fates (seq, attempt, fate) of batch n - 1 appear together: "done" | "already" | guard."""
    async def commit(self, boot: str, lineage: int, checkpoint: tuple[int, int], seqs: Sequence[int]) -> str:
        """A checkpoint (lineage, n) is on disk: ack and delete batches below n, forget the fates of exactly `seqs`."""
    async def fates(self) -> dict[int, str]:
        """Fates since the last commit: seq -> "trained" | "expired" | "filtered:reason" | "dead:reason"."""
    async def retained_bytes(self) -> int:
        """Payload of trained batches that are not yet committed: what a checkpoint would free."""
    async def finish(self, boot: str, lineage: int) -> Finished | str: ...

    # ---- side channels: lossy on purpose, never part of the account
    async def hold(self, name: str, owner: str, ttl_s: float) -> bool:
        """The lease of a singleton: True while `owner` has it."""
    async def drop_hold(self, name: str, owner: str) -> None: ...
    async def spend(self, name: str, tokens: int) -> int:
        """Count `tokens` that a teacher is asked about, or give back reserved ones (negative); the sum, of all replicas.
        An unanswered call may have been counted: the sum errs upward."""
    async def beat(self, beat: Heartbeat) -> None: ...
    async def beats(self) -> list[Heartbeat]: ...
    async def emit(self, event: Event) -> None: ...
    async def events(self, after: str = "0", count: int = 1000) -> list[tuple[str, Event]]: ...
    async def news(self, timeout_s: float) -> None:
        """Return when weights, room in the window or the end may have come, or after `timeout_s`: a hint, never a fact."""
