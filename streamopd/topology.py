"""The journey's stations: stages of a group, who works between them, and the names of their keys."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """How far a group has come. Its entry lies in the stream of the same stage."""

    ISSUED = 1
    GENERATED = 2
    SCORED = 3
    BATCHED = 4

    @property
    def stream(self) -> str:
        return STREAMS[self]


STREAMS = {Stage.ISSUED: "prompts", Stage.GENERATED: "rollouts", Stage.SCORED: "scored", Stage.BATCHED: "batches"}

SINGLETONS = ("feeder", "packer", "learner")
REPLICATED = ("generator", "teacher")
SERVICES = ("feeder", "generator", "teacher", "packer", "learner", "evaluator")
TORCH_SERVICES = ("generator", "teacher", "learner", "evaluator")

READS = {"generator": Stage.ISSUED, "teacher": Stage.GENERATED, "packer": Stage.SCORED, "learner": Stage.BATCHED}
