"""What a server does not say of itself and can be seen by what it takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec import Struct

from streamopd.errors import TeacherError
from streamopd.schemas import Array
from streamopd.schemas.teaching import PackedItem, TeacherInfo, Vocabulary

from . import Server

PAIR = [0, 0]         # the shortest prompt of which one token is scored
MOST_TOPK = 1 << 12   # ids a token that are looked for
MOST_IDS = 1 << 21    # of a vocabulary that is measured
CHUNK = 512           # ids of the vocabulary in one prompt


class Listed(Struct, frozen=True):
    """A model as `GET /v1/models` names it."""

    id: str
    max_model_len: int | None = None

    @property
    def room(self) -> int:
        """Tokens of a prompt: one more may always be written."""
        return (self.max_model_len or 1 << 20) - 1


class Models(Struct, frozen=True):
    data: list[Listed]


async def the_model(server: Server, name: str) -> Listed:
    """The server's model of that name, or its first."""
    listed = (await server.read(Models, "GET", "/v1/models")).data
    found = [model for model in listed if name in ("", model.id)]
    if not found:
        raise server.away(f"has no model {name!r}; it has: {', '.join(model.id for model in listed) or 'none'}")
    return found[0]


class Measured:
    """An API of servers that say little of themselves: each model is measured, once."""

    spells = False

    def __init__(self, model: str, ids: int = 0) -> None:
        self._model, self._ids = model, ids  # as the server calls it, "" for its first; ids that the student has
        self._met: dict[Listed, TeacherInfo] = {}

    async def meet(self, server: Server) -> TeacherInfo:
        """What was measured; asked again is only which model it is."""
        listed = await the_model(server, self._model)
        self._model = listed.id
        if listed not in self._met:
            self._met[listed] = await self._measured(server, listed)
        return self._met[listed]

    async def _measured(self, server: Server, listed: Listed) -> TeacherInfo:
        raise NotImplementedError


async def takes(server: Server, path: str, message: Any, cap: int = 1 << 20) -> bool:
    """Whether the server does what it is asked."""
    return await server.attempt(path, message, cap) is not None


async def largest(takes: Callable[[int], Awaitable[bool]], limit: int) -> int:
    """The largest number in [0, limit] that is taken, where all below one that is taken are; 0 is not asked about."""
    low, high = 0, 1
    while high <= limit and await takes(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await takes(middle) else (low, middle)
    return low


def require_ids(server: Server, known: bool, ids: int) -> None:
    """TeacherError unless the student's highest id was taken: a server that does not look at ids is not asked about higher ones."""
    if not known:
        raise TeacherError(f"{server.name} does not take id {ids - 1}, the student's highest. Name a teacher with the student's tokenizer.")


async def texts(server: Server, ids: Sequence[int], room: int, ask: Callable[[list[int]], Awaitable[Sequence[str | None]]]) -> Vocabulary:
    """What `ids` decode to one by one, asked about as prompts within `room`; `ask` gives a text an id."""
    told: dict[int, str | None] = {}
    size = max(1, min(CHUNK, room - 1))
    for start in range(0, len(ids), size):
        chunk = [int(i) for i in ids[start : start + size]]
        found = await ask(chunk)
        if len(found) != len(chunk):
            raise server.garbage(f"told {len(found)} texts for {len(chunk)} ids")
        told |= zip(chunk, found, strict=True)
    return Vocabulary(tokens=[told.get(i) for i in range(max(told, default=-1) + 1)])


def id_rows(server: Server, rows: Sequence[Sequence[int]], vocab_size: int) -> Array:
    """Ids as they are told, int32; each is one of the vocabulary."""
    wrong = next((index for row in rows for index in row if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise server.garbage(f"names id {wrong}, its vocabulary has {vocab_size}")
    return Array.of(rows, "int32")


def prompt_of(item: PackedItem) -> list[int]:
    """Context and completion as one prompt."""
    ids: list[int] = item.context_ids.numpy().tolist() + item.completion_ids.numpy().tolist()
    return ids
