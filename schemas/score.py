"""What the teachers think of a group: one Evidence (a view) a rollout and teacher."""

from __future__ import annotations

from msgspec import Struct

from .array import Array, refuse_impossible
from .rollout import Group
from .topk import TopK


class Evidence(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """One teacher's view of one rollout. Length G; row g speaks of predicting completion token g."""

    rollout_id: str
    role: str = "teacher"                # teacher | reference | self
    teacher_id: str = "default"
    teacher_version: int = 0             # of a moving teacher; 0 for a frozen one
    context_digest: str = ""             # of the ids the teacher saw before the completion
    tokenizer_digest: str = ""
    logprobs: Array                      # float32 [G]  log q(sampled token)
    support: TopK | None = None          # [G, K]  what the method asked for, deduplicated
    mass: Array | None = None            # float32 [G]  sum of q over the support
    entropy: Array | None = None         # float32 [G]  nats, of the whole distribution
    stop_logmass: Array | None = None    # float32 [G]  log of the sum of q over the stop ids
    hidden: Array | None = None          # float16 [G, d]  last hidden states, for whoever has the teacher's output head

    def __post_init__(self) -> None:
        refuse_impossible(self.logprobs, f"teacher {self.teacher_id} on {self.rollout_id}: logprobs")
        support = self.support.logprobs if self.support is not None else None
        columns = (support, self.mass, self.entropy, self.stop_logmass, self.hidden)
        lengths = {len(self.logprobs)} | {len(column) for column in columns if column is not None}
        if len(lengths) > 1:
            raise ValueError(f"teacher {self.teacher_id} on {self.rollout_id}: arrays of lengths {sorted(lengths)} in one view")


class Scored(Struct, array_like=True, omit_defaults=True, frozen=True, kw_only=True):
    """A graded group with its views: `views[i]` are the Evidences of `group.rollouts[i]`."""

    id: str
    run: str
    method: str
    born_s: float
    group: Group
    views: list[list[Evidence]]

    def __post_init__(self) -> None:
        if len(self.views) != len(self.group.rollouts):
            raise ValueError(f"group {self.id} has {len(self.group.rollouts)} rollouts but {len(self.views)} lists of views")
        for rollout, views in zip(self.group.rollouts, self.views, strict=True):
            for view in views:
                if view.rollout_id != rollout.id or len(view.logprobs) != len(rollout.completion_ids):
                    raise ValueError(
                        f"rollout {rollout.id} has {len(rollout.completion_ids)} generated tokens but "
                        f"{len(view.logprobs)} scores by {view.teacher_id} for {view.rollout_id}"
                    )
