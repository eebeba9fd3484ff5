"""ExOPD held before the cliff (arXiv 2605.08737): beyond a computable λ, text of fixed form (JSON, calls) falls apart.

    λ ≤ λ* = 1 + log c / log((1 − b) / (1 − m)),   m the teacher's mass on structure tokens, b the student's at its start, c the clip

Measure m and b of your own data: with these λ* is 1.22, the paper's own marker.
"""

from streamopd.slots import Branch, Cliff, Extrapolate, Method, ReverseKL, TruncatedRatio

GUARD = Cliff(value=1.25, teacher_mass=0.99967, start_mass=0.5, clip=5.0)
EXOPD_GUARD = Method(
    name="exopd_guard",
    summary="beyond the teacher, but never so far that structure tokens are lost",
    paper="arXiv 2605.08737",
    formula="exopd with λ = min(1.25, 1 + log c / log((1−b)/(1−m)))",
    note="The paper's formula was not seen: λ* is our derivation, set to its published marker.",
    branches=(Branch(target=Extrapolate(strength=GUARD), loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=5.0),
)
