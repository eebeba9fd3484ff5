"""The figures of a step, from what its tokens said. numpy only; T tokens of the step, in the order of its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamopd.schemas import Batch, Finish, Rollout

from .rows import Row

Floats = NDArray[np.float32]
MAX_LOG_RATIO = 20.0  # of p / mu; beyond it the ratio is a bug elsewhere, and must not hide every other token
REPEAT_WINDOW = 8     # tokens at an answer's end
REPEAT_PERIOD = 4


class Tokens(NamedTuple):
    """Columns of T trained tokens; None where nobody can know them."""

    logp: Floats                 # log p(written id) of the live student
    kernel_logp: Floats          # the same through the temperature that sampled
    entropy: Floats
    stop_logp: Floats
    kl: Floats | None            # from the teacher
    student_mass: Floats | None  # on the support
    teacher_mass: Floats | None

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """One after another."""
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def describe_rows(rows: Sequence[Row], tokens: Tokens, exact: bool) -> dict[str, float]:
    """Monitors of the trained tokens; `rows` in the order of `tokens`. A figure nobody can know is absent, not 0."""
    ages = np.concatenate([row.ages[row.fresh] for row in rows])
    of_teacher = {
        "kl" if exact else "kl_bound": tokens.kl, "student_mass": tokens.student_mass, "teacher_mass": tokens.teacher_mass
    }
    figures = {name: _mean(column) for name, column in of_teacher.items() if column is not None} | {
        "entropy": _mean(tokens.entropy),
        "age_mean": _mean(ages),
        "age_max": float(ages.max()),
        "age_p95": float(np.percentile(ages, 95)),
        "tokens": float(len(ages)),
    }
    return figures | _entropy_gap(rows, tokens) | _mismatch(rows, tokens, ages) | _stop_gap(rows, tokens)


def _entropy_gap(rows: Sequence[Row], tokens: Tokens) -> dict[str, float]:
    told = [row.view.entropy.numpy()[row.fresh] for row in rows if row.view is not None and row.view.entropy is not None]
    if len(told) < len(rows):
        return {}
    teacher = np.concatenate(told)
    return {"entropy_gap": _mean(np.abs(teacher - tokens.entropy))}


def _mismatch(rows: Sequence[Row], tokens: Tokens, ages: NDArray[np.int32]) -> dict[str, float]:
    """k3 estimates of KL(mu‖p) by age, and the effective sample size of p / mu. At age 0 they measure the engines' gap."""
    whole_kernel = np.concatenate([(row.authors == 0)[row.fresh] & (row.rollout.top_p >= 1.0) for row in rows])
    if not whole_kernel.any():  # a nucleus cannot be recomputed from one log-prob, and others wrote with theirs
        return {}
    recorded = np.concatenate([row.rollout.logprobs.numpy()[row.fresh] for row in rows])
    log_ratio = np.clip(tokens.kernel_logp - recorded, -MAX_LOG_RATIO, MAX_LOG_RATIO)[whole_kernel].astype(np.float64)
    ratio = np.exp(log_ratio)
    k3 = ratio - 1 - log_ratio
    known = ages[whole_kernel]
    by_age = {("mismatch_kl" if age == 0 else f"mismatch_kl/age_{age}"): _mean(k3[known == age]) for age in np.unique(known)}
    return by_age | {"ess": float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()))}


def _stop_gap(rows: Sequence[Row], tokens: Tokens) -> dict[str, float]:
    """log q(stop) − log p(stop) where answers ended by themselves; far below 0: student and teacher stop with other ids."""
    ends = np.cumsum([int(row.fresh.sum()) for row in rows]) - 1
    gaps = [
        float(row.view.stop_logmass.numpy()[-1] - tokens.stop_logp[end])
        for row, end in zip(rows, ends, strict=True)
        if row.rollout.finish is Finish.STOP and row.fresh[-1] and row.view is not None and row.view.stop_logmass is not None
    ]
    return {"stop_gap": float(np.mean(gaps))} if gaps else {}


def describe_answers(batch: Batch) -> dict[str, float]:
    """Figures of all answers of the student's own that came, trained or not; failed generations are not answers."""
    answers = [
        r for item in batch.items for r in item.group.rollouts
        if r.finish in (Finish.STOP, Finish.LENGTH) and all(author.who == "student" for author in r.authors)
    ]
    if not answers:
        return {}
    figures = {
        "completion_length": _mean([len(answer.completion_ids) for answer in answers]),
        "truncated_ratio": _mean([answer.finish is Finish.LENGTH for answer in answers]),
        "repeat_ratio": _mean(_repeats(answers)),
    }
    graded = [answer.outcome.correct for answer in answers if answer.outcome and answer.outcome.correct is not None]
    return figures | ({"accuracy": _mean(graded)} if graded else {})


def _repeats(answers: Sequence[Rollout]) -> NDArray[np.bool_]:
    """[answers] whether the last `REPEAT_WINDOW` tokens are one pattern of at most `REPEAT_PERIOD`, again and again."""
    tails = [answer.completion_ids.numpy()[-REPEAT_WINDOW:] for answer in answers]
    long_enough = np.array([len(tail) == REPEAT_WINDOW for tail in tails])
    ends = np.stack([tail if len(tail) == REPEAT_WINDOW else np.zeros(REPEAT_WINDOW, np.int32) for tail in tails])
    periodic = np.any([(ends[:, p:] == ends[:, :-p]).all(1) for p in range(1, REPEAT_PERIOD + 1)], axis=0)
    return np.asarray(long_enough & periodic)


def _mean(values: object) -> float:
    return float(np.mean(np.asarray(values, np.float64)))
