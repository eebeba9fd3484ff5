"""A teacher outside the run: somebody's stateless server, or several behind one id, asked over HTTP.

It is used like a local one, from a thread. Slow or away is never an item's fault: TeacherAway after a bounded time.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import stamina
from numpy.typing import NDArray

from streamopd.config import Teacher
from streamopd.errors import ConfigError, GarbageRecord, TeacherAway, TeacherRefuses
from streamopd.layout import cut_micro_batches
from streamopd.schemas import Evidence, Group
from streamopd.schemas.teaching import PackedItem, TeacherInfo, Vocabulary, Want
from streamopd.score.answer import Asked, possible_of, to_evidence
from streamopd.score.api import open_api
from streamopd.score.item import Item, Views, check_ids, score_groups
from streamopd.score.replica import ItemsRefused, Replica
from streamopd.slots import EvidenceRequest

T = TypeVar("T")
Score = Callable[[Replica, list[int]], Coroutine[Any, Any, list[Evidence]]]  # of the items by these indices
ATTEMPTS = 6         # for one batch, whichever replicas they go to
IN_FLIGHT = 2        # requests a replica: one is computed while the next one travels
LIMIT_S = 300.0      # without an answer, and a call has failed
TICK_S = 1.0         # between two signs of life while a teacher is waited for: every wait here has an end


class Mark(NamedTuple):
    """What the teacher said of one item when it was probed. Who comes back, or joins later, must say it again."""

    item: PackedItem
    logprobs: NDArray[np.float32]
    allowed_nats: float


class Vocabularied(Protocol):
    """What must be known of the student's tokenizer."""

    @property
    def stop_ids(self) -> Sequence[int]: ...

    @property
    def digest(self) -> str: ...

    @property
    def ids(self) -> int: ...


class HttpTeacher:
    """Replicas of one teacher. A call of `score` ends when for `limit_s` no batch of it was answered, however many there are."""

    def __init__(
        self, teacher_id: str, urls: Sequence[str], stop_ids: Sequence[int], token_budget: int, tokenizer_digest: str = "",
        key: str = "", timeout_s: float = 60.0, limit_s: float = LIMIT_S, api: str = "streamopd", model: str = "", ids: int = 0,
    ) -> None:
        self.teacher_id, self.stop_ids, self.token_budget = teacher_id, tuple(stop_ids), token_budget
        self.tokenizer_digest, self.timeout_s, self.limit_s = tokenizer_digest, timeout_s, limit_s
        self.info: TeacherInfo | None = None   # as it was met first; a replica that says another thing is not asked
        self.mark: Mark | None = None
        self.moved: Callable[[], None] = lambda: None  # called while it is waited for; may raise, to leave
        self.replicas = [Replica(teacher_id, url, key, timeout_s, open_api(api, model, ids)) for url in urls]
        self.api, self.spells = api, open_api(api, model).spells
        self._slots = asyncio.Semaphore(IN_FLIGHT * len(self.replicas))

    @property
    def vocab_size(self) -> int:
        assert self.info is not None, f"teacher {self.teacher_id!r} was not met"
        return self.info.vocab_size

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas]

    def apart(self, replica: Replica) -> HttpTeacher:
        """One replica as a teacher of its own, to look at it alone."""
        alone = HttpTeacher(
            self.teacher_id, [], self.stop_ids, self.token_budget, timeout_s=self.timeout_s, limit_s=self.limit_s, api=self.api
        )
        alone.replicas, alone.info, alone._slots = [replica], self.info, asyncio.Semaphore(IN_FLIGHT)
        alone.moved = lambda: self.moved()
        return alone

    def meet(self) -> TeacherInfo:
        """What one replica that answers says of itself; it holds for all from now on."""
        self.info = self._wait(self._choose_and(lambda replica: replica.meet()))
        return self.info

    def vocabulary(self, ids: Sequence[int]) -> Vocabulary:
        """What it means by `ids`, at least."""
        return self._wait(self._choose_and(lambda replica: replica.vocabulary(ids)))

    def score(self, groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None = None) -> list[Views]:
        """Views by group and rollout, as `score_groups` gives them. What it cannot tell is left out, where something can stand in."""
        assert self.info is not None, f"teacher {self.teacher_id!r} was not met"
        possible = possible_of(request, self.info, self.teacher_id, "teacher" if beside is None else "reference")
        return score_groups(groups, possible, beside, self._check, lambda items: self._score_items(items, possible))

    @property
    def asked_tokens(self) -> int:
        """Tokens that its servers were asked about since it was opened, retries included."""
        return sum(replica.asked_tokens for replica in self.replicas)

    def close(self) -> None:
        """Let go of all connections."""
        for replica in self.replicas:
            self._wait(replica.close())

    # ---------------------------------------------------------------- in the caller's thread
    def _check(self, item: Item) -> None:
        check_ids(item, self.vocab_size, self.teacher_id)

    def _score_items(self, items: Sequence[Item], request: EvidenceRequest) -> list[Evidence]:
        asked = Asked.of(request, self.stop_ids)
        sent = [asked.item(item) for item in items]

        async def score(replica: Replica, indices: list[int]) -> list[Evidence]:
            scores = await replica.score([sent[i] for i in indices], asked.want, self.vocab_size)
            return [
                to_evidence(items[i], sent[i], said, request, self.stop_ids, self.vocab_size, self.teacher_id, self.tokenizer_digest)
                for i, said in zip(indices, scores, strict=True)
            ]

        return self._wait(self._score_all([item.length for item in items], score))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the loop of all teachers, with a sign of life each second."""
        future = asyncio.run_coroutine_threadsafe(work, _loop())
        try:
            while not wait([future], TICK_S).done:
                self.moved()
            return future.result()
        finally:
            future.cancel()

    # ---------------------------------------------------------------- on the loop
    async def _score_all(self, lengths: Sequence[int], score: Score) -> list[Evidence]:
        """Evidence in the order of the items, from batches that go out side by side."""
        found: dict[int, Evidence] = {}
        quiet = asyncio.timeout(self.limit_s)

        async def fill(indices: list[int], others: bool) -> None:
            """Less at once where a batch cannot be used, and one item of another replica, before an item is at fault."""
            tokens = sum(lengths[i] for i in indices)
            try:
                async with self._slots:
                    evidence = await self._choose_and(lambda replica: score(replica, indices), tokens)
            except GarbageRecord:
                if len(indices) == 1 and not others:
                    raise
                half = len(indices) // 2
                for part in (indices[:half], indices[half:]) if half else (indices,):
                    await fill(part, others and bool(half))
                return
            found.update(zip(indices, evidence, strict=True))
            if not quiet.expired():
                quiet.reschedule(asyncio.get_running_loop().time() + self.limit_s)

        try:
            async with quiet, asyncio.TaskGroup() as group:
                for indices in self._batches(lengths):
                    group.create_task(fill(indices, others=len(self.replicas) > 1))
        except TimeoutError:
            raise TeacherAway(
                f"teacher {self.teacher_id!r} scored {len(found)} of {len(lengths)} answers and then none for {self.limit_s:g} s"
            ) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [found[i] for i in range(len(lengths))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Like lengths together, within the token budget, and a share for every replica."""
        share = -(-sum(lengths) // max(1, len(self.replicas)))
        cuts = cut_micro_batches(list(lengths), min(self.token_budget, max(share, max(lengths, default=1))))
        return [[int(i) for i in indices] for indices in cuts]

    async def _choose_and(self, ask: Callable[[Replica], Coroutine[Any, Any, T]], tokens: int = 0) -> T:
        """Ask the least busy replica; when it is away another one, or the same one later, a few times."""
        async for attempt in stamina.retry_context(
            on=self._worth_it, attempts=ATTEMPTS, timeout=2 * self.timeout_s, wait_initial=0.05, wait_max=0.5, wait_jitter=0.1
        ):
            with attempt:
                replica = await self._choose()
                replica.pending_tokens += tokens
                try:
                    return await self._ask(replica, ask)
                finally:
                    replica.pending_tokens -= tokens
        raise AssertionError("a retry ends with a value or an error")

    async def _ask(self, replica: Replica, ask: Callable[[Replica], Coroutine[Any, Any, T]]) -> T:
        """What `ask` gives; whoever answers what cannot be used rests, and is met anew."""
        await self._recognise(replica)
        try:
            answer = await ask(replica)
        except ItemsRefused:
            raise
        except GarbageRecord as error:
            replica.away(str(error))
            raise
        replica.is_well()
        return answer

    async def _choose(self) -> Replica:
        """The one with the fewest tokens pending among those that do not rest, or the first to have rested."""
        while not (awake := [replica for replica in self.replicas if not replica.rests_s]):
            await asyncio.sleep(min(replica.rests_s for replica in self.replicas))
        return min(awake, key=lambda replica: replica.pending_tokens)

    async def _recognise(self, replica: Replica) -> None:
        """Who was away, or is new, must be the teacher that was met first: by what it says of itself, and by what it scores."""
        if self.info is None or replica.trusted:
            return
        info = await replica.meet()
        if info != self.info:
            raise replica.away(f"is another teacher now: it says {info}, it was {self.info}")
        if self.mark is not None:
            try:
                (said,) = await replica.score([self.mark.item], Want(), self.vocab_size)
                apart_nats = float(np.abs(said.logprobs.numpy() - self.mark.logprobs).max())
            except ValueError as error:
                raise replica.away(f"is another teacher now: {error}") from None
            if not apart_nats <= self.mark.allowed_nats:
                raise replica.away(
                    f"is another teacher now: it scores an answer up to {apart_nats:.3g} nats away from what it said before, "
                    f"allowed are {self.mark.allowed_nats:.2g}"
                )
        replica.trusted = True

    def _worth_it(self, error: Exception) -> bool:
        """Whether to ask again: not a server that says no to us, unless there is another one."""
        return isinstance(error, TeacherAway) and not (isinstance(error, TeacherRefuses) and len(self.replicas) == 1)


def open_http_teacher(
    teacher_id: str, teacher: Teacher, tokenizer: Vocabularied, token_budget: int
) -> HttpTeacher:
    """As the run file names it; nobody is asked yet. ConfigError when its key is not in the environment."""
    key, limit_s = _key(teacher_id, teacher.key_env), max(LIMIT_S, 2 * teacher.timeout_s)
    return HttpTeacher(
        teacher_id, teacher.urls, tokenizer.stop_ids, token_budget, tokenizer.digest, key, teacher.timeout_s, limit_s, teacher.api,
        teacher.served_name, tokenizer.ids,
    )


def _key(teacher_id: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if variable and not key:
        raise ConfigError(
            f"teachers.{teacher_id}.key_env names {variable}, which is not set in the environment of this service. "
            "Export it and start again."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} holds a character that no HTTP header can carry. Export the key again, without line ends.")
    return key


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all teachers, in a thread that ends with the process, whatever a server is up to."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="teachers", daemon=True).start()
    return loop
