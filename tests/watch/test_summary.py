"""The account of a run adds up, and its fields are the ones machines were promised."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamopd.schemas import Evaluation, Heartbeat
from streamopd.watch.summary import Ages, Compared, Swaps, ages, compare, idle_fraction, read, summarise, swaps, write


def step(n: int, ages: dict[str, int] | None = None, **metrics: float) -> dict:
    return {"n": n, "born_s": 0.0, "metrics": metrics, "age_steps": ages or {}}


def beat(instance: str, pid: int = 1, **counters: float) -> Heartbeat:
    service = instance.rpartition("-")[0]
    return Heartbeat(service=service, instance=instance, pid=pid, born_s=0.0, progress=0, state="left", counters=counters)


def evaluation(who: str, n: int, **metrics: float) -> Evaluation:
    return Evaluation(who=who, n=n, born_s=0.0, metrics={name.replace("__", "/"): v for name, v in metrics.items()})


def nothing_happened(**facts):
    empty = dict(
        status="completed", metrics=[], evaluations=[], fates={}, unused=0, groups_fed=0, duplicate_trainings=0, beats=[],
        wall_s=1.0, startup_s=0.5,
    )
    return summarise(**(empty | facts))


def test_the_fields_are_exactly_the_promised_ones(tmp_path):
    write(tmp_path / "summary.json", nothing_happened())
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert list(stored) == [
        "status", "steps", "groups_fed", "groups_trained", "groups_dropped", "duplicate_trainings", "tokens_generated",
        "tokens_trained", "wall_s", "startup_s", "age_steps", "swaps", "learner_idle_fraction", "eval", "kl_heldout",
        "peak_rss_mb",
    ]
    assert list(stored["age_steps"]) == ["mean", "p95", "max"]
    assert list(stored["swaps"]) == ["count", "in_flight", "median_s"]
    assert list(stored["kl_heldout"]) == ["before", "after"]


def test_every_group_is_accounted_for_once():
    fates = {0: "trained", 1: "trained", 2: "expired", 3: "filtered:truncated", 4: "filtered:truncated", 5: "dead:killed 3"}
    summary = nothing_happened(fates=fates, unused=4, groups_fed=10)
    assert summary.groups_trained == 2
    assert summary.groups_dropped == {"dead:killed 3": 1, "expired": 1, "filtered:truncated": 2, "unused": 4}
    assert summary.groups_trained + sum(summary.groups_dropped.values()) == summary.groups_fed


def test_a_summary_survives_its_file(tmp_path):
    summary = nothing_happened(evaluations=[evaluation("student", 0, kl_teacher_student=2.5)])
    write(tmp_path / "summary.json", summary)
    assert read(tmp_path / "summary.json") == summary


def test_tokens_steps_and_ages_are_summed_over_the_steps():
    lines = [step(1, {"0": 90}, tokens_trained=90), step(2, {"1": 8, "4": 2}, tokens_trained=10)]
    summary = nothing_happened(metrics=lines, beats=[beat("generator-0", tokens=70), beat("generator-0", 2, tokens=50)])
    assert (summary.steps, summary.tokens_trained, summary.tokens_generated) == (2, 100, 120)
    assert summary.age_steps == Ages(mean=0.16, p95=1.0, max=4.0)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 20), st.integers(1, 50), min_size=1))
def test_the_95th_percentile_age_leaves_at_most_a_twentieth_of_the_tokens_above_it(tokens_by_age):
    p95 = ages(tokens_by_age).p95
    total = sum(tokens_by_age.values())
    assert sum(c for age, c in tokens_by_age.items() if age > p95) <= total * 0.05 + 1e-9
    assert sum(c for age, c in tokens_by_age.items() if age < p95) < total * 0.95


def test_swaps_of_all_generators_are_counted_and_a_lone_generator_has_the_exact_median():
    assert swaps([beat("generator-0", swaps=5, swaps_in_flight=3, swap_median_s=0.02)]) == Swaps(5, 3, 0.02)
    both = [beat("generator-0", swaps=9, swap_median_s=0.02), beat("generator-1", swaps=1, swap_median_s=0.9)]
    assert swaps(both) == Swaps(10, 0, 0.02)
    assert swaps([]) == Swaps(0, 0, None)


def test_two_generators_with_one_median_count_twice():
    equal = [beat("generator-0", swaps=2, swap_median_s=0.02), beat("generator-1", swaps=2, swap_median_s=0.02)]
    assert swaps([*equal, beat("generator-2", swaps=3, swap_median_s=0.5)]).median_s == 0.02


def test_idle_is_waiting_over_waiting_and_working():
    assert idle_fraction([step(1, wait_s=1.0, busy_s=2.0), step(2, wait_s=0.0, busy_s=1.0)]) == 0.25
    assert idle_fraction([]) == 0.0


def test_before_is_the_lowest_version_and_after_the_highest():
    found = compare([evaluation("student", n, accuracy_greedy=n / 100) for n in (0, 50, 98)])
    assert found == {"accuracy_greedy": Compared(0.0, 0.98, None)}


def test_a_single_evaluation_is_a_before_without_an_after():
    assert compare([evaluation("student", 0, accuracy_greedy=0.25)]) == {"accuracy_greedy": Compared(0.25, None, None)}


def test_teachers_with_their_own_prompts_are_averaged_over_prompts():
    found = compare([
        evaluation("teacher:json", 0, accuracy_greedy=0.9, accuracy_greedy__json=0.9, prompts=96),
        evaluation("teacher:plain", 0, accuracy_greedy=0.4, prompts=24),
    ])
    assert found["accuracy_greedy"].teacher == pytest.approx(0.8)
    assert found["accuracy_greedy/json"].teacher == pytest.approx(0.9)
    assert "prompts" not in found


def test_heldout_kl_is_teacher_to_student():
    found = nothing_happened(evaluations=[
        evaluation("student", 0, kl_teacher_student=2.7, kl_student_teacher=0.5),
        evaluation("student", 28, kl_teacher_student=0.18, kl_student_teacher=0.17),
    ])
    assert (found.kl_heldout.before, found.kl_heldout.after) == (2.7, 0.18)


def test_peak_memory_is_of_the_largest_process_of_a_service():
    beats = [beat("generator-0", rss_mb=370), beat("generator-1", rss_mb=410), beat("learner-0", rss_mb=450)]
    assert nothing_happened(beats=beats).peak_rss_mb == {"generator": 410, "learner": 450}
