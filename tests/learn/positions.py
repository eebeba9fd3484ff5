"""Single positions for the objective: logits beside what teachers say, and columns that a record would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from streamopd.learn.objective import Facts, Known, Look, Observed, Target, Verdict, Views, instruct, judge
from streamopd.slots import Branch, FullVocabulary, Loss, Method


def known_about(ids: Tensor, **columns: object) -> Known:
    """Tokens of one correct-or-not-graded answer of the student's own, sampled by the live student unless `logmu` says otherwise."""
    count, plain = len(ids), torch.ones(len(ids))
    defaults = {
        "row": torch.zeros(count, dtype=torch.long), "group": torch.zeros(count, dtype=torch.long), "position": torch.arange(count),
        "segment": torch.zeros(count, dtype=torch.long), "ids": ids, "author": torch.zeros(count, dtype=torch.long),
        "logmu": torch.zeros(count), "temperature": plain, "correct": plain * torch.nan, "pass_rate": plain * torch.nan,
        "advantage": torch.zeros(count), "uniform": torch.zeros(count), "weight": plain,
    }
    return Known(**(defaults | {name: torch.as_tensor(value) for name, value in columns.items()}))  # type: ignore[arg-type]


def look_at(
    logits: Tensor, target: Target | None, stop_ids: Sequence[int] = (), reference: Target | None = None, **columns: object
) -> Look:
    """A look at tokens; what was written is what the target says, or `ids`."""
    ids = columns.pop("ids", None)
    written = torch.as_tensor(ids) if ids is not None else target.sampled  # type: ignore[union-attr]
    return Look(logits, Views(target, reference), known_about(written, **columns), stop_ids)


def told(
    logits: Tensor, target: Target | None, method: Method, stop_ids: Sequence[int] = (), reference: Target | None = None,
    **columns: object,
) -> Verdict:
    """The verdict on each token."""
    return judge(look_at(logits, target, stop_ids, reference, **columns), method.at(0.0))


# ---------------------------------------------------------------- expectations over the vocabulary, in float64
P, Q, B = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2])  # core.md 0.1
Floats = NDArray[np.float64]
D = np.log(Q) - np.log(P)
REVERSE, FORWARD, HALF_JSD = (0.42153, -0.27207, -0.14947), (0.4, -0.2, -0.2), (0.09534, -0.05630, -0.03904)


class Spoken(NamedTuple):
    """What one position says with each of the V tokens as the one that was written."""

    loss: Floats      # [V]
    gradient: Floats  # [V, V]  of each loss in the student's logits

    def mean(self, under: Floats) -> Floats:
        """[V] the gradient that is to be expected when tokens are written by `under`."""
        return under @ self.gradient


def composed(*branches: Branch, **settings: object) -> Method:
    return Method(name="m", summary="", branches=branches, **settings)  # type: ignore[arg-type]


def gradient_of(loss: Loss, **settings: object) -> Branch:
    """A branch in its policy-gradient form."""
    return Branch(loss=loss, form="policy_gradient", **settings)  # type: ignore[arg-type]


def exact(loss: Loss, **settings: object) -> Branch:
    """A branch back-propagated directly over the whole vocabulary."""
    return Branch(loss=loss, support=FullVocabulary(), **settings)  # type: ignore[arg-type]


def whole(q: Floats, ids: Sequence[int] | None = None, stop_ids: Sequence[int] = ()) -> Target:
    """A teacher's whole distribution at one position, seen once for every token of `ids` (all of them) that may be written there."""
    written = torch.tensor(range(len(q)) if ids is None else list(ids))
    stop = torch.tensor(q[list(stop_ids)].sum()).log().expand(len(written)) if stop_ids else None
    return Target(written, torch.tensor(np.log(q)).expand(len(written), -1), stop_logmass=stop)


def spoken(
    method: Method, p: Floats = P, q: Floats = Q, *, mu: Floats | None = None, b: Floats | None = None, stop_ids: Sequence[int] = (),
    **columns: object,
) -> Spoken:
    """Every token of the vocabulary as the written one, sampled by `mu` (the live student when None)."""
    logits = torch.tensor(np.log(p)).repeat(len(p), 1).requires_grad_()
    reference = None if b is None else whole(b, stop_ids=stop_ids)
    logmu = np.log(p if mu is None else mu)
    loss = told(logits, whole(q, stop_ids=stop_ids), method, stop_ids, reference, **({"logmu": logmu} | columns)).loss
    if loss.requires_grad:
        loss.sum().backward()
    gradient = np.zeros((len(p), len(p))) if logits.grad is None else logits.grad.numpy()
    return Spoken(loss.detach().numpy(), gradient)


def orders_of(
    method: Method, p: Floats = P, q: Floats = Q, b: Floats | None = None, *, stop_ids: Sequence[int] = (), **columns: object
) -> Floats:
    """[branches, V] what each branch tells each token of the vocabulary when it is the written one."""
    logits = torch.tensor(np.log(p)).repeat(len(p), 1)
    reference = None if b is None else whole(b, stop_ids=stop_ids)
    look = look_at(logits, whole(q, stop_ids=stop_ids), stop_ids, reference, **({"logmu": np.log(p)} | columns))
    return instruct(Observed(look, method), look.known, method.at(0.0)).numpy()


def facts_of(**columns: Sequence[float] | Floats) -> Facts:
    """Facts by hand."""
    return {name: torch.tensor(np.asarray(values), dtype=torch.float64) for name, values in columns.items()}


def kl(a: Floats, b: Floats) -> float:
    """KL(a‖b)."""
    return float((a * (np.log(a) - np.log(b))).sum())


def slope(of: Callable[[Floats], float], p: Floats, step: float = 1e-6) -> Floats:
    """The gradient of a function of the student's distribution in its logits, by central differences."""
    logits, steps = np.log(p), np.eye(len(p)) * step
    return np.array([of(softmax(logits + d)) - of(softmax(logits - d)) for d in steps]) / (2 * step)


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def distributions(most: int = 6, spread: float = 3.0) -> st.SearchStrategy[list[Floats]]:
    """Three distributions over one vocabulary."""

    def drawn(size: int, seed: int) -> list[Floats]:
        rng = np.random.default_rng(seed)
        return [softmax(rng.normal(size=size) * spread) for _ in range(3)]

    return st.builds(drawn, st.integers(2, most), st.integers(0, 2**32 - 1))
