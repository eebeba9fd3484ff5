"""A limit on what a teacher outside is asked, for endpoints that cost: tokens of context and answer, of all replicas of a run."""

from __future__ import annotations

from collections.abc import Sequence

from streamopd.errors import TeacherError
from streamopd.schemas import Group
from streamopd.stream import Broker


class Budget:
    """`limit` tokens of one teacher. Retries count as they are made; the broker keeps the sum."""

    def __init__(self, teacher_id: str, limit: int, broker: Broker) -> None:
        self.teacher_id, self.limit, self._broker = teacher_id, limit, broker
        self._counted = 0  # of this process, told to the broker

    async def require(self, groups: Sequence[Group], asked_tokens: int) -> None:
        """TeacherError when these groups are more than is left; they stay where they are. `asked_tokens`: as in `count`."""
        asked, spent = sum(map(_tokens, groups)), await self.count(asked_tokens)
        if spent + asked > self.limit:
            raise TeacherError(
                f"The budget of teacher {self.teacher_id!r} is spent: it was asked about {spent:,} tokens, the next {asked:,} are more "
                f"than teachers.{self.teacher_id}.token_limit = {self.limit:,}. Raise it and run again: the run goes on where it is."
            )

    async def count(self, asked_tokens: int) -> int:
        """`asked_tokens` since the teacher was opened, here; all that were spent, everywhere."""
        news, self._counted = asked_tokens - self._counted, asked_tokens
        return await self._broker.spend(self.teacher_id, news)


def _tokens(group: Group) -> int:
    context = group.prompt.teacher_prompt_ids or group.prompt.prompt_ids
    return sum(len(context) + len(rollout.completion_ids) for rollout in group.rollouts)
