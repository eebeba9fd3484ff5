"""What is known of the tokens of a step before the model is asked: columns of all fresh tokens, row after row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from streamopd.schemas import Rollout
from streamopd.slots import Advantage, Method, Trusted

from .advantage import advantages
from .freshness import age_weights
from .objective import Known
from .rows import Row

Column = NDArray[np.generic]


def known_of(rows: Sequence[Row], n: int, method: Method) -> Known:
    """The columns of step `n`, [T]."""
    fresh = np.concatenate([row.fresh for row in rows])
    counts = [int(row.fresh.sum()) for row in rows]
    told = {row.seq: _group_says(row, method) for row in rows}

    def tokens(of: Callable[[Row], Column], dtype: type[np.generic]) -> torch.Tensor:
        return _column(rows, fresh, of, dtype)

    def answers(values: Sequence[float], dtype: type[np.generic] = np.float32) -> torch.Tensor:
        return _spread(values, counts, dtype)

    return Known(
        row=answers(range(len(rows)), np.int64),
        group=answers([row.seq for row in rows], np.int64),
        position=tokens(lambda row: np.arange(len(row.fresh)), np.int64),
        segment=tokens(lambda row: row.steps, np.int64),
        ids=tokens(lambda row: row.completion, np.int64),
        author=tokens(lambda row: row.authors, np.int64),
        logmu=tokens(lambda row: row.rollout.logprobs.numpy(), np.float32),
        temperature=answers([row.rollout.temperature or 1.0 for row in rows]),
        correct=answers([_correct(row.rollout) for row in rows]),
        pass_rate=answers([told[row.seq][0] for row in rows]),
        advantage=answers([told[row.seq][1].get(row.rollout.id, 0.0) for row in rows]),
        uniform=tokens(lambda row: _uniforms(row, n), np.float32) if _tosses(method) else torch.zeros(sum(counts)),
        weight=torch.from_numpy(_weights(rows, method)),
    )


def _group_says(row: Row, method: Method) -> tuple[float, dict[str, float]]:
    """The share of correct answers among those graded, without those that somebody else wrote whole; each one's advantage by rollout id."""
    graded = [(r.id, r.outcome) for r in row.peers if r.outcome is not None]
    given = {r.id for r in row.peers if len(r.authors) == 1 and r.authors[0].who != "student"}
    verdicts = [outcome.correct for name, outcome in graded if outcome.correct is not None and name not in given]
    setting = next((branch.loss for branch in method.branches if isinstance(branch.loss, Advantage)), None)
    rewards = np.array([outcome.reward for _, outcome in graded], np.float64)
    found = advantages(rewards, setting) if setting else np.zeros(len(graded))
    return (
        float(np.mean(verdicts)) if verdicts else float("nan"),
        {name: float(value) for (name, _), value in zip(graded, found, strict=True)},
    )


def _correct(rollout: Rollout) -> float:
    verdict = rollout.outcome.correct if rollout.outcome is not None else None
    return float("nan") if verdict is None else float(verdict)


def _tosses(method: Method) -> bool:
    return any(isinstance(slot, Trusted) for slot in method.slots)


def _uniforms(row: Row, n: int) -> NDArray[np.float32]:
    """The token's own coin at this step, however the step is cut."""
    seed = xxhash.xxh3_64_intdigest(f"{row.rollout.id}@{n}".encode())
    return np.random.Generator(np.random.Philox(seed)).random(len(row.completion), np.float32)


def _weights(rows: Sequence[Row], method: Method) -> NDArray[np.float32]:
    """By age, relative: mean one over the step. "answer_mean": every answer as a whole counts the same, and age within it."""
    ages = [row.ages[row.fresh] for row in rows]
    if method.reduce == "token_mean":
        return age_weights(np.concatenate(ages), method.age_weight)
    total = sum(len(of_row) for of_row in ages)
    return np.concatenate([age_weights(of_row, method.age_weight) * np.float32(total / (len(rows) * len(of_row))) for of_row in ages])


def _column(rows: Sequence[Row], fresh: NDArray[np.bool_], of: Callable[[Row], Column], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([of(row) for row in rows])[fresh].astype(dtype, copy=False))


def _spread(values: Sequence[float], counts: Sequence[int], dtype: type[np.generic]) -> torch.Tensor:
    """A value of each row, on all its tokens."""
    return torch.from_numpy(np.repeat(np.asarray(values, dtype), counts))
