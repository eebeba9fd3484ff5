"""The page of methods side by side hides no row, and gives every method as many answers a step."""

from __future__ import annotations

from typing import Any

from benchmarks.methods_ab import ANSWERS, BASELINES, LOWER, METHODS, RATE, page, settings
from streamopd.config import load


def ended(method: str, seed: int, accuracy: float) -> dict[str, Any]:
    figures = {"before": 0.2, "after": accuracy, "teacher": 0.99}
    return {
        "method": method, "seed": seed, "wall_s": 60.0, "status": "completed", "steps": 150, "accuracy_greedy": figures,
        "kl_teacher_student": {"before": 4.0, "after": 0.5}, "tokens": {"generated": 9000, "trained": 8000},
    }


def test_a_failed_run_is_a_row_with_its_sentence_and_a_method_without_any_run_stands_there_too() -> None:
    broken = {"method": "opd", "seed": 1, "failed": "The loss of batch 3\nis not | finite."}
    written = page({
        "command": ["python", "-m", "benchmarks.methods_ab"], "machine": {"cpu": "a cpu", "cores": 2}, "steps": 150,
        "answers_per_step": 64, "methods": ["opd", "default", "nobody"], "seeds": [0, 1], "settings": ["learn.lr=1e-3"],
        "rows": [ended("opd", 0, 0.5), broken, ended("default", 0, 0.25), ended("default", 1, 0.75)],
    })
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["opd", "default", "nobody", "opd", "opd", "default", "default"]
    assert "1 of 2; failed: The loss of batch 3 is not \\| finite." in rows[0]
    assert "0.500 (0.250 … 0.750)" in rows[1]
    assert rows[1].endswith("2 of 2 |")
    assert "0 of 0" in rows[2]
    assert len({line.replace("\\|", "").count("|") for line in rows[:3]}) == 1


def test_every_method_is_given_as_many_answers_a_step() -> None:
    for name in (*METHODS, *BASELINES):
        config, _ = load("recipes/quickstart.toml", settings(name, seed=1, steps=150))
        assert (config.method, config.seed, config.learn.max_steps) == (name, 1, 150)
        assert config.group_size * config.learn.groups_per_step == ANSWERS
        assert config.learn.lr == LOWER.get(name, RATE)
    assert load("recipes/quickstart.toml", [])[0].learn.lr == RATE, "the quickstart's"
    assert load("recipes/quickstart.toml", settings("grpo", 0, 150))[0].group_size == 8
