"""What a view does not tell, and what is cut away of one: nobody is told anything false because of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from streamopd.learn.objective import Target
from streamopd.learn.objective.pool import pooled
from streamopd.learn.trainer import Trainer
from streamopd.slots import (
    JSD,
    Advantage,
    Branch,
    Cliff,
    Extrapolate,
    Keep,
    Linear,
    Method,
    Pool,
    ReverseKL,
    StudentTop,
    Support,
    TeacherTop,
    Union,
    WrittenBy,
)

from .lessons import STOP, lesson
from .positions import told

P = torch.tensor([0.3, 0.2, 0.4, 0.1], dtype=torch.float64)
STOPS = (2, 3)


def view(masses: torch.Tensor, k: int = 4, stop: bool = True, exact_mass: bool = True) -> Target:
    """A teacher's view of one token over its k first ids, supports rounded as on the wire."""
    logp = masses.log()
    return Target(
        sampled=torch.tensor([2]), support=logp[:k].half().double()[None], ids=torch.arange(k)[None],
        mass=masses[:k].sum()[None] if exact_mass else None, logp=logp[2][None],
        stop_logmass=masses[list(STOPS)].sum().log()[None] if stop else None,
    )


@pytest.mark.parametrize("stop", [True, False])
def test_a_student_that_is_its_teacher_is_not_told_off_for_ending_whatever_the_teacher_tells_of_it(stop: bool) -> None:
    method = Method(name="m", summary="", branches=(Branch(loss=ReverseKL(), form="policy_gradient"),))
    assert float(told(P.log()[None], view(P, stop=stop), method, STOPS).loss) == pytest.approx(0, abs=1e-9)


def test_the_tail_of_a_cut_view_is_exact_where_its_support_is_rounded() -> None:
    q = torch.tensor([0.6, 0.3, 0.0998, 0.0002], dtype=torch.float64)
    p = torch.tensor([0.3, 0.2, 0.2, 0.3], dtype=torch.float64)
    whole = float((p * (p / q).log()).sum())
    for support in (TeacherTop(3), StudentTop(3), Union()):
        method = Method(name="m", summary="", branches=(Branch(support=support),))
        assert float(told(p.log()[None], view(q, k=3), method).loss) <= whole + 1e-2
    one = pooled([view(q, k=3)] * 2, [1.0, 1.0], "geometric", ())
    assert float(one.mass) == pytest.approx(0.9998, abs=1e-5)


@pytest.mark.parametrize("support", [TeacherTop(2), StudentTop(2), Union()], ids=str)
def test_a_target_beyond_the_teacher_is_made_on_the_teachers_cells(support: Support) -> None:
    q, b = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.1, 0.3, 0.5], dtype=torch.float64)
    method = Method(name="m", summary="", branches=(Branch(support=support, target=Extrapolate(1.25)),))
    assert 0 < float(told(P.log()[None], view(q), method, reference=view(b)).loss) < 3


def test_what_one_view_of_a_step_lacks_is_used_of_none_however_the_step_is_cut(
    untied: Path, elder: Path, open_trainer: Callable[..., Trainer]
) -> None:
    method, found = Method(name="m", summary="", branches=(Branch(),)), []
    batch = lesson(method, untied, elder)
    first = batch.items[0]
    views = [[replace(view, stop_logmass=None, mass=None) for view in of] for of in first.views]
    batch = replace(batch, items=[replace(first, views=views), *batch.items[1:]])
    for cut in ({"micro_batch_tokens": 1 << 20}, {"micro_batch_tokens": 40, "head_chunk": 7}):
        trainer = open_trainer(untied, method, lr=0.0, stop_ids=(STOP, 5), **cut)
        trainer.train(batch)
        found.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))  # type: ignore[union-attr]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("wrong", [
    {"branches": (Branch(form="pg"),)}, {"branches": (Branch(support=TeacherTop(4, "renormalise")),)}, {"teachers": Pool("geo")},
    {"branches": (Branch(loss=Advantage("grop"), form="policy_gradient"),)}, {"reduce": "answer-mean"}, {"routing": "exclusiv"},
    {"branches": (Branch(weight=(Keep(over="steps"),)),)}, {"branches": (Branch(loss=ReverseKL),)},
    {"branches": (Branch(when=WrittenBy("techer")),)}, {"branches": (Branch(loss=JSD(beta="half")),)},
], ids=lambda wrong: str(next(iter(wrong.values())))[:60])
def test_a_word_that_no_slot_knows_is_refused_and_not_taken_for_another(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is not what it can be"):
        Method(name="mine", summary="", **wrong)  # type: ignore[arg-type]


def test_a_guard_never_turns_away_from_the_teacher() -> None:
    assert Cliff(teacher_mass=0.9, start_mass=0.95).at(0.0) == 1.25
    with pytest.raises(ValueError, match="between 0 and 1"):
        Cliff(teacher_mass=1.0)
    with pytest.raises(ValueError, match="progress of the run"):
        Linear(1.0, 0.0, until=0.0)
