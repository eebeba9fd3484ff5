"""A limit on what a teacher outside is asked, for endpoints that cost: tokens of context and answer, of all replicas of a run."""

from __future__ import annotations

from collections.abc import Sequence

from streamopd.errors import TeacherError
from streamopd.schemas import Group
from streamopd.stream import Broker


class Budget:
    """`limit` tokens of one teacher. The broker keeps the sum, so it holds for one life of the broker's data."""

    def __init__(self, teacher_id: str, limit: int, broker: Broker) -> None:
        self.teacher_id, self.limit, self._broker = teacher_id, limit, broker
        self._counted = 0  # of this process, told to the broker

    async def require(self, tokens: int = 1) -> None:
        """Reserve them; TeacherError, and nothing is reserved, when they are more than is left."""
        spent = await self._broker.spend(self.teacher_id, tokens) - tokens
        if spent + tokens > self.limit:
            await self._broker.spend(self.teacher_id, -tokens)
            raise TeacherError(
                f"The budget of teacher {self.teacher_id!r} is spent: it was asked about {spent:,} tokens, the next {tokens:,} are more "
                f"than teachers.{self.teacher_id}.token_limit = {self.limit:,}. Raise it and run again: the run goes on where it is."
            )

    async def settle(self, reserved: int, asked_tokens: int) -> None:
        """What was reserved becomes what was asked, retries included; `asked_tokens` since the teacher was opened."""
        news, self._counted = asked_tokens - self._counted, asked_tokens
        await self._broker.spend(self.teacher_id, news - reserved)


def tokens_of(groups: Sequence[Group], own_context: bool = False) -> int:
    """Of contexts and answers, once each; `own_context`: the student's own prompt, whatever the teacher's is."""
    return sum(_tokens(group, own_context) for group in groups)


def _tokens(group: Group, own_context: bool) -> int:
    theirs = None if own_context else group.prompt.teacher_prompt_ids
    context = group.prompt.prompt_ids if theirs is None else theirs
    return sum(len(context) + len(rollout.completion_ids) for rollout in group.rollouts)
