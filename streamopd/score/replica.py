"""One address of a teacher outside the run: what it is asked goes out with a time limit, and comes back within a size."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from streamopd.errors import GarbageRecord, TeacherAway, TeacherError, TeacherRefuses
from streamopd.schemas.teaching import JSON, MSGPACK, PackedItem, PackedScore, TeacherInfo, Vocabulary, Want, read_json
from streamopd.score.api import Api

T = TypeVar("T")
CONNECT_S = 5.0
REST_S, LONGEST_REST_S = 0.25, 5.0  # after the first failure, and after many; told by the server: up to TOLD_REST_S
TOLD_REST_S = 30.0
ROOM_BYTES = 1 << 20                # of an answer that no number is asked for in
MOST_BYTES = 512 << 20              # of any answer: it is held in memory whole
MAX_SENTENCE = 300                  # characters of a stranger's words that are repeated
FAULT_OF_ITEM = (400, 413, 422)
CANNOT = (*FAULT_OF_ITEM, 404, 405, 501)
FAULT_OF_CALLER = (401, 402, 403, 404, 405)


class ItemsRefused(GarbageRecord):
    """The server is well, and will not have these items."""


class Words(msgspec.Struct, frozen=True):
    """A sentence as others put it into the body of a refusal."""

    message: str


class Refusal(msgspec.Struct, frozen=True):
    """A body of an answer that is not 200: the contract's, or what OpenAI's servers send."""

    error: str | Words = ""
    message: str = ""


class Replica:
    """A server, how busy it is, and how long it is left alone after a failure."""

    def __init__(self, teacher_id: str, url: str, key: str, timeout_s: float, api: Api) -> None:
        self.teacher_id, self.url, self.timeout_s = teacher_id, url.rstrip("/"), timeout_s
        self.asked_tokens = 0        # of items that went out, retries and probes too, and of its vocabulary
        self.pending_tokens = 0      # that it is asked about now; whoever asks counts
        self.failures = 0            # in a row
        self.rests_until_s = 0.0     # monotonic
        self.trusted = False         # met, and recognised, since it was last away
        self._api, self._key = api, key
        self._client: httpx.AsyncClient | None = None

    async def meet(self) -> TeacherInfo:
        """What it is and can do."""
        try:
            info = await self._api.meet(self)
        except TeacherError:  # waiting would not help
            raise
        except (ValueError, ArithmeticError) as error:  # GarbageRecord among them; no item was asked about that could be at fault
            raise self.away(str(error).removeprefix(f"{self.name} ")) from None
        return msgspec.structs.replace(info, model=_printable(info.model))

    async def vocabulary(self, ids: Sequence[int]) -> Vocabulary:
        """What it means by `ids`, at least."""
        self.asked_tokens += len(ids)
        try:
            return await self._api.vocabulary(self, ids)
        except (ValueError, ArithmeticError) as error:  # numbers that fit nowhere; no item is at fault
            raise self.away(str(error).removeprefix(f"{self.name} ")) from None

    async def score(self, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        """One score an item. GarbageRecord: the answer is none, or the server will not have these items."""
        self.asked_tokens += sum(len(item.context_ids) + len(item.completion_ids) for item in items)
        try:
            return await self._api.score(self, items, want, vocab_size)
        except GarbageRecord:
            raise
        except (ValueError, ArithmeticError) as error:  # lengths that do not match, numbers that fit nowhere
            raise self.garbage(f"gave what cannot be read: {error}") from None

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

    def garbage(self, what: str) -> GarbageRecord:
        """An answer that cannot be used."""
        return GarbageRecord(f"{self.name} {self._clean(what)}")

    # ---------------------------------------------------------------- one request
    async def ask(self, method: str, path: str, body: bytes | None, cap: int, form: str = JSON) -> tuple[bytes, str]:
        """(body, its form) of a good answer."""
        response, answer = await self._send(method, path, body, cap, form)
        if response.status_code != 200:
            raise self._refusal(response, answer, f"{method} {path}")
        said = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if said not in (JSON, MSGPACK):
            raise self.away(f"answered {method} {path} with {said or 'no content type'!r}; {JSON} was expected")
        return answer, said

    async def read(self, kind: type[T], method: str, path: str, message: Any = None, cap: int = ROOM_BYTES) -> T:
        """A JSON answer as a `kind`; who answers anything else is away, or gave garbage where it was asked for scores."""
        answer, _ = await self.ask(method, path, None if message is None else msgspec.json.encode(message), cap)
        try:
            found: T = read_json(kind, answer, cap)
        except ValueError as error:
            what = f"answered {method} {path} with what cannot be read: {error}"
            raise (self.away(what) if message is None else self.garbage(what)) from None
        return found

    async def attempt(self, path: str, message: Any, cap: int = ROOM_BYTES, no: Sequence[int] = CANNOT) -> bytes | None:
        """The body of a good answer, or None when the server cannot do what it is asked; it must not be in trouble, or say no to us."""
        response, answer = await self._send("POST", path, msgspec.json.encode(message), cap)
        if response.status_code == 200:
            return answer
        if response.status_code in no:
            return None
        raise self._refusal(response, answer, f"POST {path}")

    async def _send(self, method: str, path: str, body: bytes | None, cap: int, form: str = JSON) -> tuple[httpx.Response, bytes]:
        headers = {} if body is None else {"Content-Type": form}
        try:
            async with asyncio.timeout(self.timeout_s), self._connection().stream(method, path, content=body, headers=headers) as response:
                return response, await self._within(response, min(cap, MOST_BYTES))
        except TimeoutError:
            raise self.away(f"did not answer {method} {path} within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise self.away(f"does not answer {method} {path}: {_told(error)}") from None

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

    def _clean(self, words: str) -> str:
        """Without the key, whoever repeated it."""
        return words.replace(self._key, "***") if self._key else words


def _sentence(body: bytes) -> str:
    """What a server says went wrong, or the beginning of what it sent."""
    try:
        told: Refusal = read_json(Refusal, body)
        words = told.error.message if isinstance(told.error, Words) else told.error or told.message
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
