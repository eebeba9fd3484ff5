"""What holds of every method there is: through the real teacher's evidence and the real trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from streamopd import methods
from streamopd.learn.trainer import Trainer
from streamopd.slots import (
    Advantage,
    Entropy,
    FullVocabulary,
    GoldOrGuess,
    Interpolate,
    Likelihood,
    MarginShift,
    Method,
    ReferenceKL,
    Teacher,
)

from .lessons import STOP, lesson

NAMES = methods.names()
ORIGINALS = [name for name in NAMES if not methods.load(name).alias_of]


def gradient(trainer: Trainer, method: Method, student: Path, teacher: Path, n: int = 50) -> torch.Tensor:
    """Of the student's parameters at step n of 100, as one vector."""
    trainer.teachers = {"one": teacher, "two": teacher}
    trainer.train(lesson(method, student, teacher, n))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters.values()]
    return torch.cat([grad.flatten() for grad in grads])


def rests(method: Method) -> bool:
    """Whether the method has nothing to say to a student that is its teacher: divergences from the teacher and nothing else."""
    others = (Advantage, Likelihood, Entropy, ReferenceKL, GoldOrGuess)
    return all(
        not isinstance(branch.loss, others)
        and isinstance(branch.target, Teacher | Interpolate)
        and not any(isinstance(shape, MarginShift) for shape in branch.shape)
        and not (branch.form == "direct" and getattr(branch.support, "remainder", "") == "drop")  # truncated sums do not cancel
        for branch in method.all_branches
    )


def same_answers(one: Method, other: Method) -> bool:
    """Whether the two see the same answers: a method may differ from another in who writes them alone."""
    return (one.behaviours, one.select) == (other.behaviours, other.select)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("n", [0, 99])
def test_gradients_are_finite_and_there_is_one(
    name: str, n: int, untied: Path, elder: Path, open_trainer: Callable[..., Trainer]
) -> None:
    method = methods.load(name)
    found = gradient(open_trainer(untied, method, lr=0.0, stop_ids=(STOP,)), method, untied, elder, n)
    assert torch.isfinite(found).all()
    assert float(found.norm()) > 0


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    name: str, untied: Path, elder: Path, open_trainer: Callable[..., Trainer]
) -> None:
    method = methods.load(name)
    whole, pieces = (
        gradient(open_trainer(untied, method, lr=0.0, stop_ids=(STOP,), **cut), method, untied, elder)
        for cut in ({"micro_batch_tokens": 1 << 20}, {"micro_batch_tokens": 40, "head_chunk": 7})
    )
    torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-6 * max(1.0, float(whole.abs().max())))


@pytest.mark.parametrize("name", [name for name in ORIGINALS if rests(methods.load(name))])
def test_a_student_that_is_its_teacher_is_told_nothing(
    name: str, untied: Path, elder: Path, open_trainer: Callable[..., Trainer]
) -> None:
    method = methods.load(name)
    trainer = open_trainer(untied, method, lr=0.0, stop_ids=(STOP,), max_grad_norm=0.0)
    at_home = float(gradient(trainer, method, untied, untied).norm())
    abroad = float(gradient(trainer, method, untied, elder).norm())
    exact = any(isinstance(slot, FullVocabulary) and slot.by == "logprobs" for slot in method.slots)
    rounding = 1e-5 if exact else 5e-3  # float16 supports and hidden states
    assert at_home <= rounding * abroad


def test_no_two_methods_that_are_not_aliases_have_the_same_gradients(
    untied: Path, elder: Path, open_trainer: Callable[..., Trainer]
) -> None:
    found: dict[str, np.ndarray] = {}
    for name in ORIGINALS:
        method = methods.load(name)
        trainer = open_trainer(untied, method, lr=0.0, stop_ids=(STOP,), max_grad_norm=0.0)
        found[name] = torch.cat([gradient(trainer, method, untied, elder, n) for n in (0, 99)]).numpy()
    for one in ORIGINALS:
        for other in ORIGINALS:
            if one < other and same_answers(methods.load(one), methods.load(other)):
                assert not np.allclose(found[one], found[other], rtol=1e-4, atol=1e-7), f"{one} and {other}"
