"""What a teacher is asked about one rollout, and how answers come back as views of groups. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamopd.errors import GarbageRecord
from streamopd.schemas import Evidence, Finish, Group, Prompt, Rollout
from streamopd.slots import EvidenceRequest

MIN_LOGPROB = -1e4  # what float16 can hold; -inf means padding and nothing else


class Item(NamedTuple):
    """One rollout to score."""

    rollout_id: str
    context: NDArray[np.int32]             # [P]
    completion: NDArray[np.int32]          # [G]
    student_ids: NDArray[np.int32] | None  # [G, k]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.completion)

    @property
    def context_digest(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.context.tobytes())


def score_groups(
    groups: Sequence[Group], request: EvidenceRequest, check: Callable[[Item], None],
    score: Callable[[Sequence[Item]], Iterable[Evidence]],
) -> list[list[list[Evidence]]]:
    """Views by group and rollout, from the evidence of all items at once; [] for a rollout that failed or is empty."""
    asked = [item_of(group.prompt, rollout, request) for group in groups for rollout in group.rollouts]
    items = [item for item in asked if item]
    for item in items:
        check(item)
    scored = iter(score(items))
    views = iter([[next(scored)] if item else [] for item in asked])
    return [[next(views) for _ in group.rollouts] for group in groups]


def item_of(prompt: Prompt, rollout: Rollout, request: EvidenceRequest) -> Item | None:
    """None: the rollout failed, was aborted, or is empty."""
    if rollout.finish in (Finish.ERROR, Finish.ABORTED) or not len(rollout.completion_ids):
        return None
    context = rollout.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
    student_ids = None
    if request.student_ids:
        if rollout.student_topk is None or rollout.student_topk.ids is None:
            raise GarbageRecord(f"The method asks for the student's own top ids, but rollout {rollout.id} carries none.")
        student_ids = rollout.student_topk.ids.numpy()
    return Item(rollout.id, context.numpy(), rollout.completion_ids.numpy(), student_ids)


def check_ids(item: Item, vocab_size: int, teacher_id: str) -> None:
    """GarbageRecord when the item has no context, or an id that the teacher does not know."""
    if not len(item.context):
        raise GarbageRecord(f"Rollout {item.rollout_id} has no context: its first token cannot be scored.")
    for ids in (item.context, item.completion, item.student_ids):
        if ids is not None and ids.size and ids.max() >= vocab_size:
            raise GarbageRecord(
                f"Rollout {item.rollout_id} holds id {ids.max()}, but teacher {teacher_id!r} "
                f"knows {vocab_size}. Student and teacher need one tokenizer."
            )
