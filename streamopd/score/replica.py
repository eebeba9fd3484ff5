"""One address of a teacher outside the run: what it is asked goes out with a time limit, and comes back within a size."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from streamopd.errors import GarbageRecord, TeacherAway, TeacherRefuses
from streamopd.schemas.teaching import (
    JSON,
    MSGPACK,
    Complaint,
    PackedItem,
    PackedScore,
    ScoreRequest,
    TeacherInfo,
    Vocabulary,
    Want,
    read_answer,
    read_json,
    write_message,
)
from streamopd.schemas.wire import decode

CONNECT_S = 5.0
REST_S, LONGEST_REST_S = 0.25, 5.0  # after the first failure, and after many; told by the server: up to TOLD_REST_S
TOLD_REST_S = 30.0
NUMBER_BYTES = {JSON: 40, MSGPACK: 8}  # one number is shorter
ROOM_BYTES = 64 << 10               # names, brackets
MAX_VOCABULARY_BYTES = 64 << 20
MAX_SENTENCE = 300                  # characters of a stranger's words that are repeated
FAULT_OF_ITEM = (400, 413, 422)
FAULT_OF_CALLER = (401, 402, 403, 404, 405)


class ItemsRefused(GarbageRecord):
    """The server is well, and will not have these items."""


class Replica:
    """A server, how busy it is, and how long it is left alone after a failure."""

    def __init__(self, teacher_id: str, url: str, key: str, timeout_s: float) -> None:
        self.teacher_id, self.url, self.timeout_s = teacher_id, url.rstrip("/"), timeout_s
        self.pending_tokens = 0      # that it is asked about now; whoever asks counts
        self.failures = 0            # in a row
        self.rests_until_s = 0.0     # monotonic
        self.trusted = False         # met, and recognised, since it was last away
        self._form = JSON
        self._key = key
        self._client: httpx.AsyncClient | None = None

    async def meet(self) -> TeacherInfo:
        """`GET /info`. The form of its answer is the form that it is spoken to in."""
        body, self._form = await self._ask("GET", "/info", None, ROOM_BYTES)
        info: TeacherInfo = self._read(TeacherInfo, body, self._form)
        return msgspec.structs.replace(info, model=_printable(info.model))

    async def vocabulary(self) -> Vocabulary:
        """`GET /vocabulary`."""
        body, form = await self._ask("GET", "/vocabulary", None, MAX_VOCABULARY_BYTES)
        vocabulary: Vocabulary = self._read(Vocabulary, body, form)
        return vocabulary

    async def score(self, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        """`POST /score`, one score an item. GarbageRecord: the answer is none, or the server will not have these items."""
        cap = ROOM_BYTES + NUMBER_BYTES[self._form] * sum(_numbers(item, want, vocab_size) for item in items)
        body, form = await self._ask("POST", "/score", write_message(ScoreRequest(items=list(items), want=want), self._form), cap)
        try:
            scores = read_answer(body, form, cap).scores
        except ValueError as error:
            raise GarbageRecord(self._clean(f"{self.name} answered what is no answer of the contract: {error}")) from None
        if len(scores) != len(items):
            raise GarbageRecord(f"{self.name} gave {len(scores)} scores for {len(items)} items")
        return scores

    def is_well(self) -> None:
        """It gave what can be used: the next failure is a first one again."""
        self.failures = 0

    @property
    def name(self) -> str:
        return f"teacher {self.teacher_id!r} at {self.url}"

    @property
    def rests_s(self) -> float:
        """Seconds until it may be asked again."""
        return max(0.0, self.rests_until_s - time.monotonic())

    def away(self, what: str, rest_s: float = 0.0) -> TeacherAway:
        """A failure: it rests, and is met anew before it is trusted again."""
        self.trusted = False
        return self.rests(what, rest_s)

    def rests(self, what: str, rest_s: float = 0.0) -> TeacherAway:
        """It is left alone for a while, longer each time."""
        self.failures += 1
        rest_s = rest_s or min(LONGEST_REST_S, REST_S * 2.0 ** min(self.failures - 1, 16)) * random.uniform(0.75, 1.25)
        self.rests_until_s = time.monotonic() + rest_s
        return TeacherAway(f"{self.name} {self._clean(what)}")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    # ---------------------------------------------------------------- one request
    async def _ask(self, method: str, path: str, body: bytes | None, cap: int) -> tuple[bytes, str]:
        """(body, form) of a good answer."""
        headers = {} if body is None else {"Content-Type": self._form}
        try:
            async with asyncio.timeout(self.timeout_s), self._connection().stream(method, path, content=body, headers=headers) as response:
                answer = await self._within(response, cap)
        except TimeoutError:
            raise self.away(f"did not answer {method} {path} within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise self.away(f"does not answer {method} {path}: {_told(error)}") from None
        if response.status_code != 200:
            raise self._refusal(response, answer, f"{method} {path}")
        form = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if form not in (JSON, MSGPACK):
            raise self.away(f"answered {method} {path} with {form or 'no content type'!r}; the contract knows {JSON} and {MSGPACK}")
        return answer, form

    def _connection(self) -> httpx.AsyncClient:
        """One pool of connections. No proxy and no redirect: the key goes where the run file says, and nowhere else."""
        if self._client is None:
            headers = {"Accept": f"{MSGPACK}, {JSON};q=0.5", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._client = httpx.AsyncClient(
                base_url=self.url, headers=headers, trust_env=False, follow_redirects=False,
                timeout=httpx.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s)),
            )
        return self._client

    async def _within(self, response: httpx.Response, cap: int) -> bytes:
        """The body as it came, never unpacked, and no more of it than was asked for."""
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > cap:
                raise self.away(f"answered with more than the {cap:,} bytes that the request can need")
        return bytes(body)

    def _refusal(self, response: httpx.Response, body: bytes, what: str) -> Exception:
        status, words = response.status_code, _printable(self._clean(_sentence(body)))
        if status in FAULT_OF_ITEM:
            return ItemsRefused(f"{self.name} refuses {what} ({status}): {words}")
        if status in FAULT_OF_CALLER or 300 <= status < 400:
            self.away("")
            target = f" to {response.headers['location'][:MAX_SENTENCE]!r}" if "location" in response.headers else ""
            return TeacherRefuses(self._clean(f"{self.name} answers {what} with {status}{target}: {words}"))
        told_s = _retry_after_s(response)
        rest = self.rests if status == 429 or told_s else self.away  # busy is not somebody else
        return rest(f"answers {what} with {status}: {words}", told_s)

    def _read(self, kind: Any, body: bytes, form: str) -> Any:
        try:
            return decode(kind, body) if form == MSGPACK else read_json(kind, body)
        except ValueError as error:
            raise self.away(f"answered what is no {kind.__name__}: {error}") from None

    def _clean(self, words: str) -> str:
        """Without the key, whoever repeated it."""
        return words.replace(self._key, "***") if self._key else words


def _numbers(item: PackedItem, want: Want, vocab_size: int) -> int:
    """How many numbers the answer to an item holds."""
    support = item.support_ids.shape[1] if item.support_ids is not None else 0
    columns = 3 + 2 * want.topk + support + (vocab_size if want.whole else 0)
    return len(item.completion_ids) * columns + 64


def _sentence(body: bytes) -> str:
    """What a server says went wrong: its `error`, or the beginning of what it sent."""
    try:
        words: str = read_json(Complaint, body).error
    except ValueError:
        words = body[: 4 * MAX_SENTENCE].decode("utf-8", "replace")
    return words or "no reason"


def _printable(words: str) -> str:
    """A stranger's words on one short line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in words[:MAX_SENTENCE]).strip()


def _told(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


def _retry_after_s(response: httpx.Response) -> float:
    told = response.headers.get("retry-after", "")
    return min(TOLD_REST_S, float(told)) if told.isdecimal() else 0.0
