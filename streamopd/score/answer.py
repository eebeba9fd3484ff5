"""A stranger's answer as evidence: every length, id and sum is checked, and the ids of a token become one row.

Shapes: G tokens of the completion, K of the teacher's own top ids, S given ids, V vocabulary, U ids of the union.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamopd.errors import GarbageRecord, TeacherError
from streamopd.schemas import Array, Evidence, TopK
from streamopd.schemas.teaching import PackedItem, PackedScore, ScoreItem, TeacherInfo, Want
from streamopd.score.item import MIN_LOGPROB, Item, refuse_slice_beyond
from streamopd.slots import EvidenceRequest

AGREE_NATS = 0.05  # between two things said of one id at one token
SLACK_NATS = 0.01  # above 0, where a log-prob ends: rounding of low precisions

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


class Asked(NamedTuple):
    """A method's request in the words of the contract."""

    want: Want
    given: tuple[int, ...]  # ids to score at every token, whatever comes with an item

    @classmethod
    def of(cls, request: EvidenceRequest, stop_ids: Sequence[int]) -> Asked:
        if request.full:  # entropy and stop mass follow
            return cls(Want(whole=True), ())
        given = {*(stop_ids if request.stop else ()), *request.slice_ids}
        return cls(Want(topk=request.teacher_k, entropy=True, stop_ids=list(stop_ids)), tuple(sorted(given)))

    def item(self, item: Item) -> PackedItem:
        """An item as it is sent."""
        support = self._support(item)
        return ScoreItem(
            context_ids=Array.of(item.context, "int32"), completion_ids=Array.of(item.completion, "int32"),
            support_ids=Array.of(support, "int32") if support.shape[1] else None,
        )

    def _support(self, item: Item) -> Ints:
        length = len(item.completion)
        given = np.tile(np.array(self.given, np.int32), (length, 1))
        return given if item.support_ids is None else np.concatenate([item.support_ids, given], 1)


def possible_of(request: EvidenceRequest, info: TeacherInfo, teacher_id: str, role: str = "teacher") -> EvidenceRequest:
    """What a teacher can give of it. Fewer ids are a coarser partition: a looser bound of the same divergence (core.md I11).

    Student ids and stop ids go where it scores no given ids; its own go where it tells none, and the sampled token stays.
    TeacherError for what nothing coarser can stand in for: hidden states, a slice, the ids of the view beside a reference's.
    """
    refuse_slice_beyond(request.slice_ids, f"teacher {teacher_id!r}", info.vocab_size)
    if problem := _irreplaceable(request, info, f"teachers.{teacher_id}", role):
        raise TeacherError(problem)
    if not info.scores_ids:
        request = replace(request, student_ids=False, stop=False)
    if info.max_topk < 0:
        request = replace(request, teacher_k=0)
    alone = not (request.full or request.teacher_k or request.student_ids or request.slice_ids)
    return replace(request, sampled=request.sampled or alone)


def _irreplaceable(request: EvidenceRequest, info: TeacherInfo, name: str, role: str) -> str:
    if request.hidden:
        return no_hidden(name)
    if request.slice_ids and not info.scores_ids:
        return (
            f"{name} cannot score ids that it is given; this method asks about a slice of {len(request.slice_ids)} ids at every token. "
            f"Give {name}.model a folder and leave url out, or use a method without VocabularySlice."
        )
    if role == "reference" and request.student_ids and not info.scores_ids:
        return (
            f"{name} cannot score ids that it is given; a reference is asked about the very ids that the teacher told. Give "
            f"{name}.model a folder and leave url out, or leave {name} out: the student's initial weights take its place."
        )
    return ""


def no_hidden(name: str) -> str:
    """The sentence for a server that is asked for hidden states."""
    return (
        f'{name} is reached by url, and servers send no hidden states; this method asks for them (FullVocabulary(by="hidden")). Give '
        f'{name}.model a folder and leave url out, or use FullVocabulary(by="logprobs").'
    )


def to_evidence(
    item: Item, sent: PackedItem, score: PackedScore, request: EvidenceRequest, stop_ids: Sequence[int], vocab_size: int,
    teacher_id: str, tokenizer_digest: str,
) -> Evidence:
    """The view that an answer gives; GarbageRecord when it is no answer to what was asked."""
    length, where = len(item.completion), f"teacher {teacher_id!r} on rollout {item.rollout_id}"
    sampled_G = _floats(score.logprobs, (length,), f"{where}: logprobs")
    support: TopK | None
    stop_G: Floats | None
    entropy_G: Floats | None
    if request.full:
        logp_GV = _floats(score.vocab_logprobs, (length, vocab_size), f"{where}: vocab_logprobs")
        _agree(logp_GV[np.arange(length), item.completion], sampled_G, item.completion, where)
        support, mass_G = TopK(None, Array.of(logp_GV, "float32")), np.ones(length, np.float32)
        entropy_G = _entropy(logp_GV)
        stop_G = _logsumexp(logp_GV[:, list(stop_ids)]) if stop_ids else None
    else:
        ids_GU, logp_GU = _union(_said(item, sent, score, request, sampled_G, vocab_size, where), where)
        mass_G = np.where(ids_GU >= 0, np.exp(logp_GU), 0).sum(1)
        support = TopK(Array.of(ids_GU, "int32"), Array.of(logp_GU, "float16")) if ids_GU.shape[1] else None
        entropy_G = _optional(score.entropy, length, f"{where}: entropy")
        stop_G = _optional(score.stop_logmass, length, f"{where}: stop_logmass")
    return Evidence(
        rollout_id=item.rollout_id, role=item.role, teacher_id=teacher_id, context_digest=item.context_digest,
        tokenizer_digest=tokenizer_digest,
        logprobs=Array.of(sampled_G, "float32"), support=support, mass=Array.of(mass_G, "float32"),
        entropy=None if entropy_G is None else Array.of(entropy_G, "float32"),
        stop_logmass=None if stop_G is None else Array.of(stop_G, "float32"),
    )


def _said(
    item: Item, sent: PackedItem, score: PackedScore, request: EvidenceRequest, sampled_G: Floats, vocab_size: int, where: str
) -> list[tuple[Ints, Floats]]:
    """(ids [G, n], log-probs [G, n]) of everything that was asked about single ids."""
    length = len(item.completion)
    said: list[tuple[Ints, Floats]] = []
    if request.teacher_k:
        shape = (length, min(request.teacher_k, vocab_size))
        ids_GK = _ids(score.topk_ids, shape, f"{where}: topk_ids", vocab_size)
        said.append((ids_GK, _floats(score.topk_logprobs, shape, f"{where}: topk_logprobs")))
    if sent.support_ids is not None:
        shape = (length, sent.support_ids.shape[1])
        asked_GS: Ints = sent.support_ids.numpy()
        said.append((asked_GS, _floats(score.support_logprobs, shape, f"{where}: support_logprobs", padding=asked_GS < 0)))
    if request.sampled:
        said.append((item.completion[:, None], sampled_G[:, None]))
    if request.teacher_k:
        for ids, logp in said[1:]:
            _refuse_likelier(*said[0], ids, logp, where)
    return said


def _refuse_likelier(topk_ids: Ints, topk_logp: Floats, ids: Ints, logp: Floats, where: str) -> None:
    """What is not among its most likely ids cannot be likelier than all of these."""
    lowest_G1 = topk_logp.min(1, keepdims=True)
    outside = (ids >= 0) & ~(ids[:, :, None] == topk_ids[:, None, :]).any(2)
    wrong = outside & (logp > lowest_G1 + AGREE_NATS + 0.01 * np.abs(lowest_G1))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise GarbageRecord(
            f"{where}: at token {row}, id {ids[row, column]} has log-prob {logp[row, column]:.4g} and is not among topk_ids, whose "
            f"lowest is {lowest_G1[row, 0]:.4g}"
        )


def _union(said: Sequence[tuple[Ints, Floats]], where: str) -> tuple[Ints, Floats]:
    """Each id once a row, ascending, then -1 with -inf. Who says two things of one id contradicts itself."""
    if not said:
        return np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    ids, logp = (np.concatenate(parts, 1) for parts in zip(*said, strict=True))
    ids = np.where(ids < 0, np.iinfo(np.int32).max, ids)
    order = np.argsort(ids, 1, kind="stable")
    ids, logp = np.take_along_axis(ids, order, 1), np.take_along_axis(logp, order, 1)
    again = np.zeros_like(ids, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    held = ids < np.iinfo(np.int32).max
    rows, columns = np.nonzero(again & held)
    _agree(logp[rows, columns - 1], logp[rows, columns], ids[rows, columns], where, rows)
    kept = held & ~again
    front = np.argsort(~kept, 1, kind="stable")[:, : int(kept.sum(1).max())]
    ids, logp, kept = (np.take_along_axis(values, front, 1) for values in (ids, logp, kept))
    return np.where(kept, ids, -1).astype(np.int32), np.where(kept, np.maximum(logp, MIN_LOGPROB), -np.inf).astype(np.float32)


def _agree(one: Floats, other: Floats, ids: Ints, where: str, rows: NDArray[np.intp] | None = None) -> None:
    apart = np.abs(np.maximum(one, MIN_LOGPROB) - np.maximum(other, MIN_LOGPROB)) > AGREE_NATS + 0.01 * np.abs(one)
    if apart.any():
        at = int(apart.argmax())
        token = at if rows is None else int(rows[at])
        raise GarbageRecord(f"{where}: id {ids[at]} has two log-probs at token {token}, {one[at]:.4g} and {other[at]:.4g}")


def _floats(array: Array | None, shape: tuple[int, ...], what: str, padding: NDArray[np.bool_] | None = None) -> Floats:
    """Log-probs that were asked for: finite and at most 0, but where there is padding."""
    values = _asked_for(array, shape, what, "f").astype(np.float32, copy=False)
    wrong = ~(np.isfinite(values) & (values <= SLACK_NATS))
    if padding is not None:
        wrong &= ~padding
    if wrong.any():
        raise GarbageRecord(f"{what} hold {values[wrong][0]} at token {np.nonzero(wrong)[0][0]}; a log-prob is finite and at most 0")
    return values


def _ids(array: Array | None, shape: tuple[int, ...], what: str, vocab_size: int) -> Ints:
    """Ids that were asked for, each of the vocabulary."""
    values = _asked_for(array, shape, what, "i")
    if values.min() < 0 or values.max() >= vocab_size:
        raise GarbageRecord(f"{what} span {values.min()}..{values.max()}, the vocabulary has {vocab_size}")
    return values.astype(np.int32, copy=False)


def _asked_for(array: Array | None, shape: tuple[int, ...], what: str, kind: str) -> NDArray[Any]:
    if array is None:
        raise GarbageRecord(f"{what} were asked for and are not in the answer")
    if array.shape != shape:
        raise GarbageRecord(f"{what} are {list(array.shape)}, asked were {list(shape)}")
    values = array.numpy()
    if values.dtype.kind != kind:
        raise GarbageRecord(f"{what} are {array.dtype}")
    return values


def _optional(array: Array | None, length: int, what: str) -> Floats | None:
    """A column that a teacher may be unable to give; its values are checked with the evidence."""
    return None if array is None else _asked_for(array, (length,), what, "f").astype(np.float32, copy=False)


def _entropy(logp_GV: Floats) -> Floats:
    return -(np.exp(logp_GV) * np.maximum(logp_GV, MIN_LOGPROB)).sum(1)


def _logsumexp(logp_GS: Floats) -> Floats:
    highest = logp_GS.max(1, keepdims=True)
    return (highest + np.log(np.exp(logp_GS - highest).sum(1, keepdims=True)))[:, 0]
