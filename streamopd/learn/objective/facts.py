"""What the learner knows of a token: from the model now (facts), and from the records before (Known).

Legend: N tokens of a chunk, T tokens of a step in the order of its rows, V vocabulary, K support columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from streamopd.errors import GarbageRecord
from streamopd.slots import AGREEMENT_K, Baseline, ChangePoint, FullVocabulary, Method, StudentTop, Support, Union

from .cells import Cells, Target, chosen, on_partition, on_the_same_ids, partition
from .divergence import kl_student_teacher

ROUNDING = 2e-3  # nats, of float16 log-probs near 0: what differs by less is a tie

Facts = Mapping[str, Tensor]  # [N] or [T] each, without gradient: logp, logq, logb, log_ratio, and what slots name


class Known(NamedTuple):
    """Columns of tokens, from records alone."""

    row: Tensor          # int64    which answer of the step
    group: Tensor        # int64    which group
    position: Tensor     # int64    in its answer
    segment: Tensor      # int64    which step of its answer
    ids: Tensor          # int64    the token
    author: Tensor       # int64    0 student, 1 teacher, 2 gold
    logmu: Tensor        # float32  log-prob of the kernel that sampled it
    temperature: Tensor  # float32  of that kernel, 1 for greedy
    correct: Tensor      # float32  1, 0, or nan: nobody graded it
    pass_rate: Tensor    # float32  share of correct answers in its group, nan likewise
    advantage: Tensor    # float32  of its answer in its group; 0 when the method does not ask
    uniform: Tensor      # float32  in [0, 1), its own at this step
    weight: Tensor       # float32  by age and reduction, mean one over the step

    def at(self, where: Tensor | slice) -> Known:
        """Some of the tokens."""
        return Known(*(column[where] for column in self))

    def to(self, device: torch.device) -> Known:
        return Known(*(column.to(device) for column in self))


class Views(NamedTuple):
    """What is said of N tokens by others than the student."""

    teacher: Target | None
    reference: Target | None = None

    def at(self, part: slice, device: torch.device) -> Views:
        """Some of the tokens, where they are computed on."""
        return Views(*(None if view is None else _cut(view, part, device) for view in self))


def _cut(view: Target, part: slice, device: torch.device) -> Target:
    return Target(*(None if column is None else column[part].to(device) for column in view))  # type: ignore[arg-type]


class Likeliest(NamedTuple):
    """The student's best action at N tokens."""

    logp: Tensor     # [N]  with gradient
    logq: Tensor     # [N]  -inf: the teacher was not asked about it
    written: Tensor  # bool [N]  whether it is what was written


class Look:
    """The student's logits at N tokens beside the views: everything that several slots ask for, computed once."""

    def __init__(self, logits_NV: Tensor, views: Views, known: Known, stop_ids: Sequence[int]) -> None:
        self.logits_NV = logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
        self.views, self.known, self.stop_ids = views, known, tuple(stop_ids)
        self._cells: dict[tuple[Support, bool], Cells] = {}

    @property
    def teacher(self) -> Target:
        assert self.views.teacher is not None, "the method asks for a teacher's view, and there is none"
        return self.views.teacher

    def cells(self, support: Support, of_reference: bool = False) -> Cells:
        """Student and teacher, or student and reference, over the support's cells."""
        if isinstance(support, Union):  # all that the evidence carries, whatever was asked for
            support = Union(stop=support.stop, remainder=support.remainder)
        key = (support, of_reference)
        if key not in self._cells:
            self._cells[key] = self._reference_cells(support) if of_reference else self._partition(self.teacher, support)
        return self._cells[key]

    def _partition(self, view: Target, support: Support) -> Cells:
        return partition(self.logits_NV, view, support, self.stop_ids)

    def _reference_cells(self, support: Support) -> Cells:
        """On the ids that are chosen by the teacher's view: one partition for all three."""
        view = self.views.reference
        assert view is not None, "the method asks for the reference's view, and there is none"
        if isinstance(support, FullVocabulary | Union):
            return self._partition(view, support)
        kept = chosen(self.logits_NV, self.teacher, support, self.stop_ids)
        return on_partition(self.logits_NV, on_the_same_ids(view, kept), support.remainder, self.stop_ids)

    def bare(self, support: StudentTop) -> Cells:
        """Cells of single ids, the stop ids among them as any other: what is counted is the student's top k and nothing beside."""
        return partition(self.logits_NV, self.teacher, support, ())

    @property
    def widest(self) -> Support:
        """All that the evidence carries."""
        return FullVocabulary() if self.teacher.ids is None else Union()

    @cached_property
    def total_N1(self) -> Tensor:
        return self.logits_NV.logsumexp(1, keepdim=True)

    @cached_property
    def ends_N(self) -> Tensor:
        """Whether the token ends its answer."""
        return torch.isin(self.known.ids, torch.tensor(self.stop_ids, dtype=torch.long, device=self.known.ids.device))

    @cached_property
    def token_logp_N(self) -> Tensor:
        """log p(id that was written)."""
        return (self.logits_NV.gather(1, self.known.ids[:, None]) - self.total_N1)[:, 0]

    @cached_property
    def stop_logp_N(self) -> Tensor:
        """log p(stop), whichever id says it; 0 when nothing does."""
        if not self.stop_ids:
            return torch.zeros_like(self.total_N1[:, 0])
        return self.logits_NV[:, list(self.stop_ids)].logsumexp(1) - self.total_N1[:, 0]

    @cached_property
    def logp_N(self) -> Tensor:
        """log p of the action: the token, or ending. With gradient."""
        return torch.where(self.ends_N, self.stop_logp_N, self.token_logp_N) if self.merges else self.token_logp_N

    def said_N(self, view: Target) -> Tensor:
        """log q of the action."""
        logq_N = view.logp if view.logp is not None else _in_support(view, self.known.ids)
        if not self.merges:
            return logq_N
        assert view.stop_logmass is not None
        return torch.where(self.ends_N, view.stop_logmass.to(logq_N.dtype), logq_N)

    @cached_property
    def merges(self) -> bool:
        """Whether ending is one action of several ids: on all sides, or where somebody cannot tell its mass on none."""
        return len(self.stop_ids) > 1 and all(view is None or view.stop_logmass is not None for view in self.views)

    @cached_property
    def likeliest(self) -> Likeliest:
        """The action that the student likes best."""
        logits_NV = self.logits_NV
        if self.merges:
            stops = torch.tensor(self.stop_ids, device=logits_NV.device)
            logits_NV = logits_NV.index_fill(1, stops, -torch.inf)
        ids_N = logits_NV.detach().argmax(1)
        logp_N, logq_N = (self.logits_NV.gather(1, ids_N[:, None]) - self.total_N1)[:, 0], _in_support(self.teacher, ids_N)
        written_N = ids_N == self.known.ids
        if self.merges:
            ends_N = (self.stop_logp_N > logp_N).detach()
            assert self.teacher.stop_logmass is not None
            logp_N = torch.where(ends_N, self.stop_logp_N, logp_N)
            logq_N = torch.where(ends_N, self.teacher.stop_logmass.to(logq_N.dtype), logq_N)
            written_N = torch.where(ends_N, self.ends_N, written_N)
        return Likeliest(logp_N, logq_N, written_N)

    @cached_property
    def entropy_N(self) -> Tensor:
        """H(p), without gradient."""
        total_N1 = self.total_N1  # made before: others want its gradient
        with torch.no_grad():
            p_NV = (self.logits_NV - total_N1).exp_()
            return total_N1[:, 0] - torch.bmm(p_NV[:, None, :], self.logits_NV[:, :, None])[:, 0, 0]

    def entropy(self) -> Tensor:
        """H(p)."""
        p_NV = (self.logits_NV - self.total_N1).exp()
        return self.total_N1[:, 0] - torch.linalg.vecdot(p_NV, self.logits_NV)

    @cached_property
    def kernel_logp_N(self) -> Tensor:
        """log p(token) through the temperature that sampled, without gradient."""
        if not bool((self.known.temperature != 1).any()):
            return self.token_logp_N.detach()
        hot_NV = self.logits_NV.detach() / self.known.temperature[:, None]
        return (hot_NV.gather(1, self.known.ids[:, None]) - hot_NV.logsumexp(1, keepdim=True))[:, 0]


class Observed(Mapping[str, Tensor]):
    """Facts of a chunk, looked up when a slot asks. What the look computes for one keeps its gradient: losses use it too."""

    def __init__(self, look: Look, method: Method) -> None:
        self._look, self._method, self._found = look, method, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            self._found[name] = FACTS[name](self._look, self._method).detach()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        """What a survey must write down."""
        views = self._look.views
        told = {"logq": views.teacher, "logb": views.reference}
        return iter(sorted({"logp", "log_ratio", *self._method.facts, *(name for name, view in told.items() if view is not None)}))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _in_support(view: Target, ids_N: Tensor) -> Tensor:
    if view.ids is None:
        return view.support.gather(1, ids_N[:, None])[:, 0]
    if not view.ids.shape[1]:
        return torch.full_like(ids_N, -torch.inf, dtype=view.support.dtype)
    return view.support.masked_fill(view.ids != ids_N[:, None], -torch.inf).amax(1)


def _teacher_entropy(look: Look, method: Method) -> Tensor:
    """H(q), whole; of a support alone nobody can know it."""
    if look.teacher.entropy is not None:
        return look.teacher.entropy
    if look.teacher.ids is None:
        q_NV = look.teacher.support
        return -(q_NV.exp() * q_NV.clamp(min=-1e4)).sum(1)
    raise GarbageRecord(
        f"method = {method.name!r} looks at the teacher's entropy, and the evidence carries none. Choose a teacher that tells it, "
        "or a method without."
    )


def _divergence(look: Look, method: Method) -> Tensor:
    """KL(p‖q) over all that the evidence carries."""
    cells = look.cells(look.widest)
    return kl_student_teacher(cells.p, cells.q)


def _baseline(look: Look, method: Method) -> Tensor:
    """KL(p‖q) on the student's top k, both sides renormalised; k = 0: over all that the evidence carries."""
    k = next(slot.k for slot in method.slots if isinstance(slot, Baseline))
    if k == 0:
        return _divergence(look, method)
    cells = look.cells(StudentTop(k, "renorm"))
    return kl_student_teacher(cells.p, cells.q)


def _agreement(look: Look, method: Method) -> Tensor:
    """q's mass on the student's top 16."""
    return look.bare(StudentTop(AGREEMENT_K, "drop")).q.exp().sum(1)


def _margin(look: Look, method: Method) -> Tensor:
    """Top minus mean of the teacher's log-probs over the student's top k."""
    k = next(slot.k for slot in method.slots if isinstance(slot, ChangePoint))
    q_NC = look.bare(StudentTop(k, "drop")).q
    there = q_NC > -1e3
    mean_N = q_NC.masked_fill(~there, 0).sum(1) / there.sum(1).clamp(min=1)
    return torch.where(there.any(1), q_NC.amax(1) - mean_N, 0.0)


def _rank(look: Look, method: Method) -> Tensor:
    """How many actions the teacher likes better than the student's likeliest one; infinitely many when it was not asked about it."""
    cells, logq_N = look.cells(look.widest), look.likeliest.logq
    singles_NC = cells.q[:, :-1] if cells.tail else cells.q
    rank_N = (singles_NC > logq_N[:, None] + ROUNDING).sum(1).float()
    return rank_N.masked_fill(logq_N == -torch.inf, torch.inf)


def _reference_logp(look: Look, method: Method) -> Tensor:
    assert look.views.reference is not None, "the method asks for the reference's view, and there is none"
    return look.said_N(look.views.reference)


FACTS: dict[str, Callable[[Look, Method], Tensor]] = {
    "logp": lambda look, method: look.logp_N,
    "logq": lambda look, method: look.said_N(look.teacher),
    "logb": _reference_logp,
    "log_ratio": lambda look, method: look.kernel_logp_N - look.known.logmu,
    "entropy": lambda look, method: look.entropy_N,
    "teacher_entropy": _teacher_entropy,
    "divergence": _divergence,
    "baseline": _baseline,
    "agreement": _agreement,
    "margin": _margin,
    "rank": _rank,
}
