"""What a teacher is asked about one rollout, and how answers come back as views of groups. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from msgspec.structs import replace
from numpy.typing import NDArray

from streamopd.errors import GarbageRecord, TeacherError
from streamopd.schemas import Evidence, Finish, Group, Prompt, Rollout
from streamopd.slots import EvidenceRequest

Views = list[list[Evidence]]  # of one group, by rollout
MIN_LOGPROB = -1e4  # what float16 can hold; -inf means padding and nothing else


class Item(NamedTuple):
    """One rollout to score."""

    rollout_id: str
    context: NDArray[np.int32]             # [P]
    completion: NDArray[np.int32]          # [G]
    support_ids: NDArray[np.int32] | None  # [G, k] to score at each token, whoever chose them; -1 fills a row
    role: str = "teacher"                  # of the view that comes of it

    @property
    def length(self) -> int:
        return len(self.context) + len(self.completion)

    @property
    def context_digest(self) -> str:
        return xxhash.xxh3_64_hexdigest(self.context.tobytes())


def as_reference(request: EvidenceRequest) -> EvidenceRequest:
    """What a reference is asked beside a teacher: whole where it is whole, else the ids that come with each item, and no others."""
    if request.full or request.hidden:
        return request
    return replace(request, teacher_k=0, student_ids=True, stop=False, slice_ids=(), tail=False)


def score_groups(
    groups: Sequence[Group], request: EvidenceRequest, beside: Sequence[Views] | None, check: Callable[[Item], None],
    score: Callable[[Sequence[Item]], Iterable[Evidence]],
) -> list[Views]:
    """Views by group and rollout, from the evidence of all items at once; [] for a rollout that failed or is empty.

    `beside` a teacher's views these are a reference's: of the student's own context, and of the ids that the teacher's hold.
    """
    if beside is None:
        asked = [item_of(group.prompt, rollout, request) for group in groups for rollout in group.rollouts]
    else:
        asked = [
            reference_item(rollout, views, request)
            for group, of_group in zip(groups, beside, strict=True)
            for rollout, views in zip(group.rollouts, of_group, strict=True)
        ]
    items = [item for item in asked if item]
    for item in items:
        check(item)
    scored = iter(score(items))
    views = iter([[next(scored)] if item else [] for item in asked])
    return [[next(views) for _ in group.rollouts] for group in groups]


def item_of(prompt: Prompt, rollout: Rollout, request: EvidenceRequest) -> Item | None:
    """What a teacher is asked. None: the rollout failed, was aborted, or is empty."""
    if rollout.finish in (Finish.ERROR, Finish.ABORTED) or not len(rollout.completion_ids):
        return None
    context = rollout.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
    student_ids = None
    if request.student_ids:
        if rollout.student_topk is None or rollout.student_topk.ids is None:
            raise GarbageRecord(f"The method asks for the student's own top ids, but rollout {rollout.id} carries none.")
        student_ids = rollout.student_topk.ids.numpy()
    return Item(rollout.id, context.numpy(), rollout.completion_ids.numpy(), student_ids)


def reference_item(rollout: Rollout, views: Sequence[Evidence], request: EvidenceRequest) -> Item | None:
    """What a reference is asked beside a teacher's view. None: there is none to stand beside."""
    if not views:
        return None
    support, ids = views[0].support, None
    if request.student_ids and support is not None:
        assert support.ids is not None, "a teacher that was asked about ids told the whole vocabulary"
        ids = support.ids.numpy()
    return Item(rollout.id, rollout.prompt_ids.numpy(), rollout.completion_ids.numpy(), ids, role="reference")


def refuse_slice_beyond(slice_ids: Sequence[int], who: str, vocab_size: int | None) -> None:
    """TeacherError when a slice of the vocabulary names an id that `who` does not have; None: its size is not known."""
    wrong = [i for i in slice_ids if i < 0 or (vocab_size is not None and i >= vocab_size)]
    if wrong:
        raise TeacherError(f"The method's VocabularySlice names id {wrong[0]}, and {who} has {vocab_size} ids. Take it out of the slice.")


def check_ids(item: Item, vocab_size: int, teacher_id: str) -> None:
    """GarbageRecord when the item has no context, or an id that the teacher does not know."""
    if not len(item.context):
        raise GarbageRecord(f"Rollout {item.rollout_id} has no context: its first token cannot be scored.")
    for ids in (item.context, item.completion, item.support_ids):
        if ids is not None and ids.size and ids.max() >= vocab_size:
            raise GarbageRecord(
                f"Rollout {item.rollout_id} holds id {ids.max()}, but teacher {teacher_id!r} "
                f"knows {vocab_size}. Student and teacher need one tokenizer."
            )
