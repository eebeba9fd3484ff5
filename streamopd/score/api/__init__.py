"""How a server outside is spoken to: one module an API, the contract's own or somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from streamopd.errors import GarbageRecord, TeacherAway
from streamopd.schemas.teaching import JSON, PackedItem, PackedScore, TeacherInfo, Vocabulary, Want

T = TypeVar("T")


class Server(Protocol):
    """What an API speaks to: an address that answers within limits, or fails as one of the errors of a teacher."""

    @property
    def name(self) -> str: ...

    async def ask(self, method: str, path: str, body: bytes | None, cap: int, form: str = JSON) -> tuple[bytes, str]:
        """(body, its form) of a good answer, at most `cap` bytes."""
        ...

    async def read(self, kind: type[T], method: str, path: str, message: Any = None, cap: int = ...) -> T:
        """A JSON answer as a `kind`; who answers anything else is away."""
        ...

    async def attempt(self, path: str, message: Any, cap: int = ..., no: Sequence[int] = ...) -> bytes | None:
        """The body of a good answer, or None when the server says with a status of `no` that it cannot do that."""
        ...

    def away(self, what: str) -> TeacherAway: ...

    def garbage(self, what: str) -> GarbageRecord: ...


class Api(Protocol):
    """One way to speak. `spells`: whether its vocabulary is a table of tokens, or what single ids decode to."""

    spells: bool

    async def meet(self, server: Server) -> TeacherInfo:
        """What the server is and can do, as it says or as it does when it is asked."""
        ...

    async def vocabulary(self, server: Server, ids: Sequence[int]) -> Vocabulary:
        """What the server means by `ids`, at least."""
        ...

    async def score(self, server: Server, items: Sequence[PackedItem], want: Want, vocab_size: int) -> Sequence[PackedScore]:
        """One score an item. GarbageRecord: the answer is none, or the server will not have these items."""
        ...


def open_api(name: str, model: str, ids: int = 0) -> Api:
    """By its name in the run file; `model` as the server calls it, "" for its first; `ids` that the student has."""
    if name == "vllm":
        from .vllm import Vllm

        return Vllm(model)
    if name == "sglang":
        from .sglang import SGLang

        return SGLang(model, ids)
    if name == "completions":
        from .completions import Completions

        return Completions(model, ids)
    from .contract import Contract

    return Contract()
