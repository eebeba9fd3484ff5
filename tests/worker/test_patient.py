"""A client that waits for its broker, as long as there is something to wait for."""

from __future__ import annotations

import pytest

from streamopd.errors import StreamError
from streamopd.worker.patient import PatientBroker, patient

pytestmark = pytest.mark.anyio


class Flaky:
    """A broker that answers the third call."""

    def __init__(self) -> None:
        self.calls = 0

    async def boot(self) -> str:
        self.calls += 1
        if self.calls < 3:
            raise StreamError("did not answer")
        return "b1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_an_unanswered_call_is_made_again_and_counted() -> None:
    broker = PatientBroker(Flaky(), 30.0)  # type: ignore[arg-type]
    assert await broker.boot() == "b1"
    assert broker.faults == 1


async def test_who_leaves_does_not_wait_for_a_broker_that_is_gone() -> None:
    flaky = Flaky()
    broker = patient(flaky)  # type: ignore[arg-type]
    broker.leaving = lambda: True  # type: ignore[attr-defined]
    with pytest.raises(StreamError):
        await broker.boot()
    assert flaky.calls == 2
