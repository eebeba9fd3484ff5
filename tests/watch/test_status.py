"""The status names the service that holds everybody up, and says why."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from streamopd.schemas import Heartbeat
from streamopd.stream.broker import Counters
from streamopd.watch.status import bottleneck, status_lines

NOW_S = 1000.0


def counters(end: str = "", steps: int = 7, weights_n: int = 7, **inflight: int) -> Counters:
    return Counters(
        boot="b", stamped=True, issued=500, fated=448, steps=steps, batchno=7, end=end, again=(), depths={}, pending={},
        inflight=inflight, bytes_inflight=0, weights_n=weights_n,
    )


def beat(instance: str, state: str = "working", waits_for: str = "", quiet_s: float = 0.0, **facts) -> Heartbeat:
    return Heartbeat(
        service=instance.partition("-")[0], instance=instance, pid=1, progress=5, state=state, waits_for=waits_for,
        born_s=facts.pop("born_s", NOW_S), counters={"moved_s": NOW_S - quiet_s}, **facts,
    )


@pytest.mark.parametrize(
    ("inflight", "service"),
    [
        ({"issued": 64, "generated": 0, "scored": 0, "batched": 64}, "learner"),
        ({"issued": 10, "generated": 200, "scored": 40, "batched": 0}, "teacher"),
        ({"issued": 200, "generated": 10, "scored": 40, "batched": 0}, "generator"),
        ({"issued": 0, "generated": 0, "scored": 64, "batched": 0}, "packer"),
        ({"issued": 0, "generated": 0, "scored": 0, "batched": 0}, "feeder"),
        ({}, "feeder"),
    ],
)
def test_the_bottleneck_is_where_work_lies_while_everything_behind_it_is_empty(inflight, service):
    assert bottleneck(counters(**inflight))[0] == service


def test_a_teacher_without_progress_is_named_with_its_seconds_and_its_queue():
    lines = status_lines(counters(generated=64), [beat("teacher-0", quiet_s=12), beat("learner-0")], NOW_S)
    assert lines[0] == "teacher-0 is the bottleneck: no progress for 12 s while 64 rollouts wait"


def test_of_two_replicas_the_stalled_one_is_named():
    lines = status_lines(counters(generated=64), [beat("teacher-0"), beat("teacher-1", quiet_s=30)], NOW_S)
    assert lines[0].startswith("teacher-1 is the bottleneck: no progress for 30 s")


def test_a_busy_bottleneck_is_not_called_stalled():
    assert status_lines(counters(batched=64), [beat("learner-0")], NOW_S)[0] == (
        "learner is the bottleneck: 64 groups in closed batches in front of it"
    )


def test_a_service_that_nobody_runs_is_missed():
    lines = status_lines(counters(generated=9), [beat("generator-0"), beat("teacher-0", state="left")], NOW_S)
    assert lines[0] == "No teacher is alive, and 9 rollouts wait for one."


def test_who_waits_says_for_what():
    lines = status_lines(counters(generated=64), [beat("teacher-0"), beat("learner-0", "waiting", "batches")], NOW_S)
    assert "learner-0 waits for batches" in lines


def test_a_replica_behind_is_named_with_both_versions_and_the_reason():
    behind = beat("generator-1", state="behind", waits_for="weights 7: digest of lm_head.weight differs", version=5)
    assert (
        "generator-1 is behind: it serves weights 5, the newest are 7: weights 7: digest of lm_head.weight differs"
        in status_lines(counters(issued=3), [beat("generator-0"), behind], NOW_S)
    )


def test_a_silent_instance_is_told_from_a_slow_one():
    lines = status_lines(counters(issued=3), [beat("generator-0"), beat("packer-0", born_s=NOW_S - 40)], NOW_S)
    assert "packer-0: no heartbeat for 40 s" in lines


def test_a_stopped_process_is_the_bottleneck_although_it_is_silent():
    frozen = beat("teacher-0", quiet_s=14, born_s=NOW_S - 14)
    assert status_lines(counters(generated=64), [frozen, beat("learner-0")], NOW_S)[:2] == [
        "teacher-0 is the bottleneck: no progress for 14 s while 64 rollouts wait",
        "teacher-0: no heartbeat for 14 s",
    ]


def test_a_killed_process_that_was_replaced_is_forgotten():
    killed, its_heir = beat("teacher-0-17", quiet_s=90, born_s=NOW_S - 90), beat("teacher-0-18")
    lines = status_lines(counters(generated=64), [killed, its_heir], NOW_S)
    assert lines == ["teacher is the bottleneck: 64 rollouts in front of it"]


def test_a_starting_service_is_waited_for_not_blamed():
    assert status_lines(counters(generated=64), [beat("teacher-0", state="starting", quiet_s=30)], NOW_S)[0] == (
        "teacher-0 is starting; everything waits for it."
    )


def test_a_service_that_fell_silent_while_it_started_is_blamed():
    """Its last heartbeat may be older than its first work."""
    silent = beat("teacher-0", state="starting", quiet_s=30, born_s=NOW_S - 29)
    assert status_lines(counters(generated=64), [silent], NOW_S)[:2] == [
        "teacher-0 is the bottleneck: no progress for 30 s while 64 rollouts wait", "teacher-0: no heartbeat for 29 s",
    ]


def test_before_the_learner_has_opened_the_stream_nobody_else_is_blamed():
    unopened = replace(counters(), boot="", stamped=False)
    assert status_lines(unopened, [beat("feeder-0", "waiting", "room in the window")], NOW_S) == [
        "The learner has not opened the stream yet; everything waits for it.",
        "feeder-0 waits for room in the window",
    ]


def test_after_the_end_only_the_evaluator_is_waited_for():
    lines = status_lines(counters(end="closed"), [beat("evaluator-0")], NOW_S)
    assert lines == ["The run has ended after 7 steps; the evaluator looks at the student."]


def test_an_ended_run_blames_nobody():
    assert status_lines(counters(end="closed"), [], NOW_S) == ["The run has ended after 7 steps."]
