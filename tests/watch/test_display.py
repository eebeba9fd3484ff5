"""A terminal gets a live panel, a pipe gets plain lines, and both get the figures at the end."""

from __future__ import annotations

import io
import time
from pathlib import Path

from msgspec.structs import replace

from streamopd.schemas import Evaluation, Event, Heartbeat
from streamopd.watch.display import Display, answers_before_and_after, comparison_lines, number, strip
from streamopd.watch.journal import Journal
from streamopd.watch.summary import Compared
from tests.watch.test_status import beat, counters
from tests.watch.test_summary import evaluation, nothing_happened

FLOW = counters(issued=64, generated=12, scored=40, batched=0)


def beating(instance: str, state: str = "working", waits_for: str = "") -> Heartbeat:
    """A heartbeat of this very second: the display reads the wall clock."""
    return replace(beat(instance, state, waits_for), born_s=time.time(), counters={})


def both_working() -> list[Heartbeat]:
    """Born now: a heartbeat made when the module was imported would be minutes old in a long suite."""
    return [beating("generator-0"), beating("teacher-0")]




class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def evaluated(folder: Path) -> None:
    journal = Journal(folder / "evaluations.jsonl")
    for n, completion, correct in ((0, "3+4=9", "no"), (500, "3+4=7\x1b[31m", "yes")):
        sample = {"prompt": "3+4=", "completion": completion, "correct": correct}
        journal.write(Evaluation(who="student", n=n, born_s=0.0, metrics={"accuracy_greedy": n / 500}, samples=[sample]))


def test_a_pipe_gets_one_plain_line_every_five_seconds():
    out = io.StringIO()
    display = Display("quickstart", 500, out)
    for tenth in range(101):
        display.update(FLOW, both_working(), {"kl": 0.51234}, tenth / 10)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "\x1b" not in out.getvalue()
    assert "prompts 64 ▸ rollouts 12 ▸ scored 40 ▸ batches 0 ▸ step 7/500" in lines[0]
    assert "kl 0.512" in lines[0]
    assert "generator is the bottleneck" in lines[0]


def test_a_terminal_gets_the_panel_with_name_strip_and_who_waits(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    display = Display("quickstart", 500, out)
    display.update(FLOW, both_working(), {}, 1.0)
    display.update(FLOW, [*both_working(), beating("learner-0", "waiting", "batches")], {"kl_bound": 0.25}, 2.0)
    display.stop()
    assert "quickstart" in out.getvalue()
    assert "kl_bound 0.25" in out.getvalue()
    assert "learner-0 waits for batches" in out.getvalue()


def test_events_are_told_except_the_everyday_ones():
    out = io.StringIO()
    display = Display("r", 0, out)
    for kind in ("join", "restart"):
        display.event(Event(kind=kind, source="supervisor", born_s=0.0, text="teacher-0 ended\x1b[2J with code -9"))
    assert out.getvalue() == "restart: teacher-0 ended [2J with code -9\n"


def test_the_end_shows_before_after_and_teacher_the_answers_and_the_report(tmp_path):
    evaluated(tmp_path)
    found = [evaluation("student", 0, accuracy_greedy=0.25), evaluation("student", 500, accuracy_greedy=0.98)]
    summary = nothing_happened(
        evaluations=[*found, evaluation("teacher:default", 0, accuracy_greedy=0.988)], fates={0: "trained", 1: "expired"},
        groups_fed=3, unused=1,
    )
    out = io.StringIO()
    Display("r", 500, out).finish(summary, tmp_path / "report.html")
    text = out.getvalue()
    assert "accuracy_greedy  0.25 → 0.98   teacher 0.988" in text
    assert "1 of 3 groups trained (1 expired, 1 unused)" in text
    assert "before  3+4=9 ✗" in text
    assert "after   3+4=7 [31m ✓" in text
    assert str(tmp_path / "report.html") in text
    assert str(tmp_path / "final") in text
    assert "\x1b" not in text


def test_a_failed_run_is_not_told_what_to_try_next(tmp_path):
    out = io.StringIO()
    Display("r", 0, out).finish(nothing_happened(status="failed"), tmp_path / "report.html", "teacher-0 refused to start")
    assert "Next" not in out.getvalue()
    assert "failed: 0 steps" in out.getvalue()


def test_answers_are_paired_by_prompt_and_need_two_evaluations(tmp_path):
    assert answers_before_and_after(tmp_path) == []
    evaluated(tmp_path)
    ((before, after),) = answers_before_and_after(tmp_path)
    assert (before["completion"], after["correct"]) == ("3+4=9", "yes")


def test_what_nobody_measured_is_a_dash_not_a_zero():
    assert comparison_lines({"accuracy_greedy": Compared(0.25, None, None)}) == ["  accuracy_greedy  0.25 → –"]
    assert comparison_lines({}) == ["  (nothing was evaluated)"]


def test_numbers_are_short():
    assert [number(x) for x in (0.0, 0.98712, 12345.6, 16.0, None)] == ["0", "0.987", "12346", "16", "–"]


def test_a_run_without_a_last_step_shows_no_goal():
    assert strip(FLOW, 0).endswith("step 7")


def test_each_style_follows_its_headline():
    found = {name: Compared(0.0, 0.95, None) for name in ("accuracy_greedy", "truncated_ratio", "accuracy_greedy/json")}
    assert [line.split()[0] for line in comparison_lines(found)] == ["accuracy_greedy", "accuracy_greedy/json"]
