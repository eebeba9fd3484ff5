"""Target: the distribution that a divergence aims at, made of teacher q, student p (without gradient) and reference b."""

from __future__ import annotations

from .slot import Scalar, Slot


class Teacher(Slot, frozen=True):
    """q."""


class Veto(Slot, frozen=True):
    """∝ q p^β (arXiv 2601.07155): what the student cannot reach is no target. β must come to 0."""

    beta: Scalar = 0.5


class Interpolate(Slot, frozen=True):
    """softmax((1−t) log p + t log q) (TAID, arXiv 2501.16937); at t = 1 the teacher."""

    t: Scalar = 1.0


class Extrapolate(Slot, frozen=True):
    """∝ q^λ b^(1−λ) (ExOPD, arXiv 2602.12125); at λ = 1 the teacher, beyond it past the teacher."""

    strength: Scalar = 1.25


class Tempered(Slot, frozen=True):
    """∝ q^(1/temperature)."""

    temperature: Scalar = 1.0


Target = Teacher | Veto | Interpolate | Extrapolate | Tempered
