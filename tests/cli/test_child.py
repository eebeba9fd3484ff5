"""When deaths are too many, and whose signs of life a child takes for its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from streamopd.cli.child import MAX_RESTARTS, OPENING_MOVES, WINDOW_S, Child, Deaths
from streamopd.schemas import Heartbeat


def deaths(*seen: tuple[int, bool, float]) -> Deaths:
    """(steps, worked, when) each."""
    found = Deaths()
    for steps, worked, now_s in seen:
        found.note(steps, worked, now_s)
    return found


def test_deaths_without_a_step_in_between_are_too_many_whatever_was_done_and_however_slowly() -> None:
    slow = [(7, True, 1e4 * i) for i in range(MAX_RESTARTS + 1)]
    assert not deaths(*slow[:-1]).too_many
    assert "6 times without a step" in deaths(*slow).too_many


def test_deaths_of_idle_lives_are_too_many_though_others_do_steps() -> None:
    quick = [(i, False, 10.0 * i) for i in range(MAX_RESTARTS + 1)]
    assert not deaths(*quick[:-1]).too_many
    assert "6 times within 5 minutes" in deaths(*quick).too_many


def test_a_life_that_worked_or_a_long_while_starts_the_count_again() -> None:
    quick = [(i, False, float(i)) for i in range(MAX_RESTARTS)]
    assert deaths(*quick, (98, True, 20.0), (99, False, 21.0)).counted == 1
    assert deaths(*quick, (99, False, WINDOW_S + 10.0)).counted == 1


def test_each_death_in_a_row_waits_longer_for_its_start_up_to_a_limit() -> None:
    pauses = [deaths(*[(0, True, 0.0)] * count).pause_s for count in range(1, 8)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def beat(instance: str, pid: int, progress: int) -> Heartbeat:
    return Heartbeat(service="generator", instance=instance, pid=pid, born_s=0.0, progress=progress, state="working")


def test_a_child_moves_by_its_own_heartbeats_only_and_its_next_life_begins_at_nothing(tmp_path: Path) -> None:
    child = Child("generator", "generator-0", [sys.executable, "-c", ""], tmp_path / "log")
    child.start()
    assert isinstance(child.process, subprocess.Popen)
    pid = child.process.pid
    child.process.wait()
    started_s = child.moved_s
    child.note([beat("generator-1-7", 7, 500), beat("elsewhere-generator-0", pid, 500), beat("generator-0-8", 8, 500)])
    assert (child.progress, child.moved_s) == (0, started_s)
    child.note([beat(f"generator-0-{pid}", pid, OPENING_MOVES + 1)])
    moved_s = child.moved_s
    assert child.progress == OPENING_MOVES + 1
    assert moved_s > started_s
    child.note([beat(f"generator-0-{pid}", pid, OPENING_MOVES + 1)])
    assert child.moved_s == moved_s
    child.bury(steps=3)
    child.start()
    assert child.process
    child.process.wait()
    assert child.progress == 0


def test_the_last_words_of_a_child_are_the_end_of_its_log(tmp_path: Path) -> None:
    child = Child("packer", "packer-0", [sys.executable, "-c", "print('first'); raise SystemExit('the last')"], tmp_path / "log")
    assert child.last_words() == "it left no log"
    child.start()
    assert child.process
    assert child.process.wait() == 1
    assert "the last" in child.log_path.read_text()
    assert child.last_words() in ("first", "the last")  # two pipes, one file


def test_a_refusal_is_told_with_all_its_lines(tmp_path: Path) -> None:
    child = Child("learner", "learner-0", [], tmp_path / "log")
    child.log_path.write_text("learner: an older reason\n10:00 INFO more\nlearner: The disk is full.\nMake room.\n")
    assert child.refusal() == "The disk is full. Make room."
    child.log_path.write_text("usage: streamopd\nno such option\n")
    assert child.refusal() == "no such option"
