"""TV-OPD (arXiv 2609.08341): only the sign of the log-ratio, one size for all.

    a = sign(D) × total variation of student and teacher
"""

from streamopd.slots import Branch, Method, ReverseKL, Sign, TruncatedRatio

TV_OPD = Method(
    name="tv_opd",
    summary="the sign of the log-ratio, scaled by the step's total variation",
    paper="arXiv 2609.08341",
    formula="−r sign(D) TV ∇ log p",
    note="After a note; the scale is each step's own instead of a moving mean.",
    branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(Sign(),)),),
    correction=TruncatedRatio(cap=2.0),
)
