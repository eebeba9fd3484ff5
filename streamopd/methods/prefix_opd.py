"""Prefix OPD (arXiv 2602.15260): answers end early, and later each time.

    −r D log p on the first L tokens, written no further;   L from 256 to 4,096 by half the run
"""

from streamopd.slots import Branch, Linear, Method, ReverseKL, TruncatedRatio, Until

PREFIX_OPD = Method(
    name="prefix_opd",
    summary="log-ratios as rewards on answers that end early, later each time",
    paper="arXiv 2602.15260",
    formula="−r D ∇ log p,  t < L,  L 256 → 4,096",
    note="L grows with progress, not by 256 a step.",
    behaviour=Until(tokens=Linear(256.0, 4096.0, until=0.5)),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=2.0),
)
