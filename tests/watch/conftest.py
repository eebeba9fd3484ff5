"""A run folder as a finished quickstart would leave it, smaller, with everything in it that a report shows."""

from __future__ import annotations

import math
import random
from pathlib import Path

import msgspec
import pytest

from streamopd.config import load
from streamopd.schemas import Evaluation, Event, StepDone
from streamopd.watch import summary
from streamopd.watch.journal import Journal, read

EVIL = "<script>document.title='owned'</script>\x00&amp;\x1b[31m"
STEPS = 120


@pytest.fixture
def run_folder(tmp_path) -> Path:
    folder = tmp_path / "quickstart"
    folder.mkdir()
    config, _ = load("quickstart", ["learn.max_steps=120"])
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    write_metrics(folder)
    write_evaluations(folder)
    write_events(folder)
    write_summary(folder)
    return folder


def write_metrics(folder: Path) -> None:
    journal, rng = Journal(folder / "metrics.jsonl"), random.Random(0)
    for n in range(1, STEPS + 1):
        metrics = {
            "kl": 2.2 * math.exp(-n / 35) + 0.06 + rng.random() * 0.05, "wait_s": 0.003, "busy_s": 0.15,
            "accuracy": min(0.95, n / STEPS) * (0.8 + rng.random() * 0.2), "tokens_trained": 1300 + rng.randint(-90, 90),
        }
        ages = {"0": 30, "1": 80, "2": 160, "3": 420, "4": 600} if n > 4 else {"0": 1300}
        lengths = {str(4 * i): rng.randint(2, 12) for i in range(1, 8)}
        journal.write(
            StepDone(
                n=n, born_s=1000 + n * 0.16, metrics=metrics, age_steps=ages, trained_lengths=lengths,
                dropped_lengths={"28": 1},
            )
        )


def write_evaluations(folder: Path) -> None:
    journal = Journal(folder / "evaluations.jsonl")
    for who, n, greedy, sampled, kl in (
        ("teacher:default", 0, 0.988, 0.979, None), ("student", 0, 0.25, 0.2, 1.9), ("student", STEPS, 0.98, 0.93, 0.06),
    ):
        metrics = {"accuracy_greedy": greedy, "accuracy_sampled": sampled, "prompts": 256}
        metrics |= {"kl_teacher_student": kl, "kl_student_teacher": kl / 2} if kl else {}
        samples = [
            {"prompt": "7+2+7-0+9=", "completion": "7+2=9+7=16-0=16+9=25" if greedy > 0.5 else "7+2=9", "correct": "yes"},
            {"prompt": EVIL, "completion": EVIL, "correct": "no"},
        ]
        journal.write(Evaluation(who=who, n=n, born_s=0.0, metrics=metrics, samples=samples))


def write_events(folder: Path) -> None:
    journal = Journal(folder / "events.jsonl")
    for service, wait_s in (("feeder", 18.0), ("generator", 4.2), ("teacher", 9.0), ("packer", 15.0)):
        facts = {"source": f"{service}-0"}
        journal.write(Event(kind="join", born_s=1000.0, text=f"{service}-0 joined", **facts))
        journal.write(Event(kind="leave", born_s=1020.0, data={"wait_s": wait_s}, **facts))
    journal.write(Event(kind="restart", source="teacher-0", born_s=1010.0, text="teacher-0 ended with code -9"))
    journal.write(Event(kind="quarantine", source="packer-0", born_s=1011.0, text=EVIL))


def write_summary(folder: Path) -> None:
    evaluations = [msgspec.convert(line, Evaluation) for line in read(folder / "evaluations.jsonl")]
    account = summary.summarise(
        status="completed", metrics=read(folder / "metrics.jsonl"), evaluations=evaluations,
        fates={seq: "trained" if seq % 50 else "expired" for seq in range(64 * STEPS)}, unused=192, groups_fed=64 * STEPS + 192,
        duplicate_trainings=0, beats=[], wall_s=33.1, startup_s=12.9,
    )
    summary.write(folder / "summary.json", account)
