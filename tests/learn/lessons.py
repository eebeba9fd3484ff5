"""Whole batches for any method: random answers of every kind, scored by the real teacher code for what the method asks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamopd.schemas import Array, Author, Batch, Evidence, Finish, Group, Outcome, Prompt, Rollout, Scored, Span, TopK
from streamopd.score.item import as_reference
from streamopd.score.local import LocalTeacher
from streamopd.slots import Method, Pool

VOCAB, STOP, GROUP = 300, 2, 4
FADES = 16  # tokens


@cache
def opened(folder: Path) -> PreTrainedModel:
    """The model of a folder, once."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def lesson(method: Method, student: Path, teacher: Path, n: int = 50, groups: int = 3, seed: int = 0) -> Batch:
    """A batch of step `n`: answers right and wrong, short and long, some old, the last of each group by a teacher or by the
    dataset where the method knows such, with the views that the method asks for."""
    rng = np.random.default_rng(seed)
    written = [_group(method, rng, seq, n, student) for seq in range(groups)]
    views = views_of(method, written, student, teacher)
    items = [
        Scored(id=group.id, run="r", method=method.digest, born_s=0.0, group=group, views=of_group)
        for group, of_group in zip(written, views, strict=True)
    ]
    return Batch(id=f"b{n}", run="r", method=method.digest, born_s=0.0, n=n, items=items)


def views_of(method: Method, groups: list[Group], student: Path, teacher: Path) -> list[list[list[Evidence]]]:
    """Of the teacher (two of one mind for a pool), then of the student's start as reference."""
    if not method.needs_teacher:
        return [[[] for _ in group.rollouts] for group in groups]
    names = ("one", "two") if isinstance(method.teachers, Pool) else ("one",)
    told = [_teacher(teacher, name).score(groups, method.evidence) for name in names]
    if method.needs_reference:
        told.append(_teacher(student, "reference").score(groups, as_reference(method.evidence), beside=told[0]))
    tell = _fading if student != teacher else lambda view: view
    return [
        [[tell(view) for views in of_rollout for view in views] for of_rollout in zip(*of_group, strict=True)]
        for of_group in zip(*told, strict=True)
    ]


def _fading(view: Evidence) -> Evidence:
    """On a long answer a teacher who is asked about ids ends by liking all of them equally."""
    if len(view.logprobs) <= FADES or view.support is None or view.support.ids is None or view.role != "teacher":
        return view
    support, mass = view.support.logprobs.numpy().copy(), np.asarray(view.mass.numpy())  # type: ignore[union-attr]
    count = np.isfinite(support).sum(1)
    flat = np.log(mass / count)
    support[FADES:] = np.where(np.isfinite(support), flat[:, None], -np.inf)[FADES:]
    logp = np.where(np.arange(len(flat)) < FADES, view.logprobs.numpy(), flat)
    return replace(view, support=TopK(view.support.ids, Array.of(support, "float16")), logprobs=Array.of(logp, "float32"))


def _teacher(folder: Path, name: str) -> LocalTeacher:
    return LocalTeacher(folder, name, "float32", (STOP,), 4096, model=opened(folder))


def _group(method: Method, rng: np.random.Generator, seq: int, n: int, student: Path) -> Group:
    prompt_ids = rng.integers(3, VOCAB, rng.integers(1, 6))
    prompt = Prompt(id=f"p{seq}", run="r", method=method.digest, born_s=0.0, seq=seq, prompt_ids=Array.of(prompt_ids, "int32"))
    rollouts = [_rollout(method, rng, prompt_ids, f"p{seq}.{i}", n, i, student) for i in range(GROUP)]
    return Group(id=f"p{seq}", run="r", method=method.digest, born_s=0.0, prompt=prompt, rollouts=rollouts)


def _rollout(
    method: Method, rng: np.random.Generator, prompt: NDArray[np.int64], name: str, n: int, index: int, student: Path
) -> Rollout:
    length = int(rng.integers(5, 14)) if index else 30  # one that is long enough for a change point
    ids = rng.integers(3, VOCAB, length)
    if index != 1:
        ids[-1] = STOP
    logp_GV = student_logp(student, prompt, ids)
    k = method.student_k
    best = logp_GV.topk(min(k, VOCAB), 1)
    other = "teacher" if method.needs_writing_teacher else "gold" if method.needs_gold else ""
    return Rollout(
        id=name, prompt_ids=Array.of(prompt, "int32"), completion_ids=Array.of(ids, "int32"),
        logprobs=Array.of(logp_GV[np.arange(length), ids].numpy() + rng.normal(size=length) * 0.3 - 0.3, "float32"),
        weight_spans=[Span(0, n - 2), Span(length // 2, n)] if index == 2 else [Span(0, n)],
        finish=Finish.LENGTH if index == 1 else Finish.STOP,
        student_topk=TopK(Array.of(best.indices.numpy(), "int32"), Array.of(best.values.numpy(), "float16")) if k else None,
        outcome=Outcome(float(index % 2), bool(index % 2)), authors=[Author(0, other)] if other and index == GROUP - 1 else [],
        steps=[0, length // 3, 2 * length // 3],
    )


@torch.inference_mode()
def student_logp(folder: Path, prompt: NDArray[np.int64], ids: NDArray[np.int64]) -> torch.Tensor:
    """[G, V] of a plain forward."""
    whole = torch.from_numpy(np.concatenate([prompt, ids]))[None]
    return opened(folder)(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
