"""Where the steps of an answer begin: a step ends with a token whose text contains the run's delimiter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from streamopd.errors import UserError
from streamopd.schemas import Rollout


def delimiter_ids(delimiter: str, decode: Callable[[Sequence[int]], str], ids: int) -> frozenset[int]:
    """The ids below `ids` whose own text contains `delimiter`; none for "". UserError when it fits into no token."""
    if not delimiter:
        return frozenset()
    found = frozenset(i for i in range(ids) if delimiter in decode([i]))
    if not found:
        raise UserError(
            f"generator.step_delimiter is {delimiter!r}, and none of the student's {ids} tokens contains it: every answer would "
            'be one step. Choose what one token holds, such as "\\n", or leave it out.'
        )
    return found


def step_starts(completion_ids: Sequence[int], delimiters: frozenset[int]) -> list[int]:
    """Tokens at which a step begins, the first 0; [] when the answer is one step."""
    starts = [g + 1 for g, token in enumerate(completion_ids[:-1]) if token in delimiters]
    return [0, *starts] if starts else []


def with_steps(rollout: Rollout, delimiters: frozenset[int]) -> Rollout:
    """The rollout and where its steps begin."""
    if not delimiters:
        return rollout
    return msgspec.structs.replace(rollout, steps=step_starts(rollout.completion_ids.numpy().tolist(), delimiters))
