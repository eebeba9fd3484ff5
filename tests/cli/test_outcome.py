"""What counts as a completed run, and which events are news."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from streamopd.cli.lookout import Lookout
from streamopd.cli.outcome import completed_before, shortfall, write_outcome
from streamopd.learn.checkpoint import Checkpoint, save
from streamopd.schemas import Event
from streamopd.stream.memory import MemoryBroker, MemoryStore
from streamopd.watch.journal import Journal, read

from .conftest import MakeRun
from .fakes import Weightless


def leave(folder: Path, n: int = 2, done: bool = True, final: bool = True, status: str = "completed") -> None:
    """What a run leaves in its folder."""
    checkpoint = Checkpoint(boot="b", lineage=1, n=n, record={}, dataset_digest="", method_digest="", done=done)
    save(folder / "state", checkpoint, Weightless())
    if final:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text("{}")
    write_outcome(folder, status, 0.0, [])


def test_a_completed_run_is_found_with_its_summary(tmp_path: Path) -> None:
    leave(tmp_path)
    found = completed_before(tmp_path, max_steps=2)
    assert found
    assert msgspec.json.encode(found[0]) == msgspec.json.encode(msgspec.json.decode((tmp_path / "summary.json").read_bytes()))
    assert found[1].is_file()


@pytest.mark.parametrize(
    ("left", "max_steps", "missing"),
    [
        (dict(done=False), 2, "no final checkpoint"),
        (dict(n=1), 2, "ended at step 1 of 2"),
        (dict(final=False), 2, "holds no model"),
        (dict(status="stopped"), 2, ""),
        (dict(status="failed"), 2, ""),
        (dict(), 0, ""),
    ],
)
def test_a_run_is_not_complete_and_something_is_to_be_done(tmp_path: Path, left: dict[str, bool], max_steps: int, missing: str) -> None:
    leave(tmp_path, **left)  # type: ignore[arg-type]
    assert missing in (said := shortfall(tmp_path, max_steps))
    assert bool(said) == bool(missing)
    assert completed_before(tmp_path, max_steps) is None


def test_a_summary_that_cannot_be_read_is_no_completed_run(tmp_path: Path) -> None:
    leave(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "completed"}')
    assert completed_before(tmp_path, max_steps=2) is None


@pytest.mark.anyio
async def test_events_of_lives_before_are_not_written_again_however_many(make_run: MakeRun) -> None:
    run = make_run()
    broker, lookout = MemoryBroker(run.limits, MemoryStore()), Lookout(run)
    for number in range(2500):
        await broker.emit(Event(kind="old", source="feeder-0", born_s=float(number)))
    await lookout.skip_old_events(broker)
    for number in range(1500):
        await broker.emit(Event(kind="join", source="feeder-0", born_s=float(number)))
    await lookout.look(broker)
    assert [event["kind"] for event in read(run.folder / "events.jsonl")] == ["join"] * 1500


@pytest.mark.anyio
async def test_events_that_cannot_be_written_are_shown_all_the_same(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    broker, lookout = MemoryBroker(run.limits, MemoryStore()), Lookout(run)
    lookout.events = Journal("/dev/full")
    for text in ("the first", "the second"):
        await broker.emit(Event(kind="refused", source="learner-0", born_s=0.0, text=text))
    await lookout.look(broker)
    said = capsys.readouterr().out
    assert "the first" in said
    assert "the second" in said
    assert said.count("/dev/full is not written any more: [Errno 28]") == 1
