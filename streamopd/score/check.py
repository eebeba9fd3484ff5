"""Evidence that cannot be true is refused where it enters.

Lengths and single log-probs are the schema's to check; here is what they add up to, and what they speak of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamopd.errors import GarbageRecord
from streamopd.schemas import Array, Evidence, Group, TopK

SLACK = 1e-3           # float32 sums
SUPPORT_SLACK = 1e-2   # between `mass` and the sum of a float16 support


def check_evidence(group: Group, views: Sequence[Sequence[Evidence]], vocab_size: int) -> None:
    """Raise GarbageRecord when a view is of another answer, holds an id nobody has, or sums to what no distribution does."""
    if len(views) != len(group.rollouts):
        raise GarbageRecord(f"group {group.id} has {len(group.rollouts)} rollouts but views for {len(views)}")
    for rollout, of_rollout in zip(group.rollouts, views, strict=True):
        for view in of_rollout:
            where = f"{view.role} {view.teacher_id!r} on rollout {rollout.id}"
            if view.rollout_id != rollout.id or len(view.logprobs) != len(rollout.completion_ids):
                raise GarbageRecord(
                    f"{where}: the evidence is of {view.rollout_id} with {len(view.logprobs)} tokens, "
                    f"the answer has {len(rollout.completion_ids)}"
                )
            _check_view(view, vocab_size, where)


def check_same_ids(views: Sequence[Sequence[Evidence]], beside: Sequence[Sequence[Evidence]]) -> None:
    """Raise GarbageRecord when a reference speaks of other ids than the teacher's view that it stands beside."""
    for mine, theirs in zip(views, beside, strict=True):
        for view, other in zip(mine, theirs, strict=True):
            said, asked = (None if v.support is None or v.support.ids is None else v.support.ids.numpy() for v in (view, other))
            if (said is None) != (asked is None) or (said is not None and asked is not None and not np.array_equal(said, asked)):
                raise GarbageRecord(
                    f"{view.role} {view.teacher_id!r} on rollout {view.rollout_id}: its rows are {_rows(said)}, those of "
                    f"{other.role} {other.teacher_id!r} are {_rows(asked)}; both must hold the same ids at every token"
                )


def _rows(ids: NDArray[np.int32] | None) -> str:
    return "of no ids" if ids is None else f"{list(ids.shape)} ids from {ids[:1].tolist()} on"


def _check_view(view: Evidence, vocab_size: int, where: str) -> None:
    if view.entropy is not None:
        _refuse_outside(view.entropy, -SLACK, float(np.log(vocab_size)) + SLACK, f"{where}: entropy")
    if view.mass is not None:
        _refuse_outside(view.mass, 0.0, 1.0 + SLACK, f"{where}: mass")
    if view.stop_logmass is not None:
        _refuse_outside(view.stop_logmass, -np.inf, SLACK, f"{where}: stop_logmass")
    if view.support is not None:
        _check_sums(view.support, view.mass, _checked_cells(view.support, vocab_size, where), where)
    if view.hidden is not None:
        _check_hidden(view.hidden, where)


def _refuse_outside(array: Array, low: float, high: float, what: str) -> None:
    values = array.numpy()
    wrong = ~((values >= low) & (values <= high))  # NaN is wrong too
    if wrong.any():
        raise GarbageRecord(f"{what} is {values[_first(wrong)]:.4g} at token {_first(wrong)}, outside [{low:.4g}, {high:.4g}]")


def _checked_cells(support: TopK, vocab_size: int, where: str) -> NDArray[np.bool_]:
    """[G, K] which cells hold an id. An id twice in a row would count its mass twice."""
    if support.ids is None:
        if support.logprobs.shape[1] != vocab_size:
            raise GarbageRecord(f"{where}: {support.logprobs.shape[1]} columns for a vocabulary of {vocab_size}")
        return np.ones(support.logprobs.shape, bool)
    ids = support.ids.numpy()
    if ids.size and (ids.max() >= vocab_size or ids.min() < -1):
        raise GarbageRecord(f"{where}: support ids span {ids.min()}..{ids.max()}, the vocabulary has {vocab_size}")
    ordered = np.sort(ids, 1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise GarbageRecord(f"{where}: a support row names one id twice")
    return np.asarray(ids >= 0)


def _check_sums(support: TopK, mass: Array | None, cells: NDArray[np.bool_], where: str) -> None:
    logp = support.logprobs.numpy()
    if not np.isfinite(logp[cells]).all():
        raise GarbageRecord(f"{where}: an id of the support has log-prob -inf, which means padding")
    total = np.where(cells, np.exp(logp, dtype=np.float64), 0.0).sum(1)
    claimed = np.ones(len(total)) if support.ids is None else total if mass is None else mass.numpy()
    wrong = (total > 1 + SUPPORT_SLACK) | (np.abs(total - claimed) > SUPPORT_SLACK)
    if wrong.any():
        at = _first(wrong)
        raise GarbageRecord(f"{where}: the support sums to {total[at]:.4f} at token {at}, claimed is {claimed[at]:.4f}")


def _check_hidden(hidden: Array, where: str) -> None:
    if len(hidden.shape) != 2 or not hidden.shape[1] or hidden.dtype != "float16":
        raise GarbageRecord(f"{where}: hidden states are {hidden.dtype}{list(hidden.shape)}; they are float16 [tokens, width]")
    wrong = ~np.isfinite(hidden.numpy()).all(1)
    if wrong.any():
        raise GarbageRecord(f"{where}: the hidden state at token {_first(wrong)} is not finite")


def _first(wrong: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(wrong)[0])
