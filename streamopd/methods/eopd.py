"""Entropy-aware OPD (arXiv 2603.07079): reverse KL everywhere, forward KL added where the teacher is unsure.

    L_t = −clip(r, ±.2) D log p(y_t) + 1[H(q_t) > .8 nats] Σ_{v ∈ top-16(q)} q (log q − log p)
"""

from streamopd.slots import Branch, ClippedRatio, ForwardKL, Method, ReverseKL, TeacherEntropy, TeacherTop

EOPD = Method(
    name="eopd",
    summary="the policy gradient of reverse KL, and forward KL added where the teacher is unsure",
    paper="arXiv 2603.07079",
    formula="−r D ∇ log p + 1[H(q) > .8] Σ_{v ∈ top-16(q)} q (log q − log p)",
    note="After a reader's note and a port of the code, not the authors' own.",
    branches=(
        Branch(loss=ReverseKL(), form="policy_gradient"),
        Branch(when=TeacherEntropy(above=0.8), support=TeacherTop(16, remainder="drop"), loss=ForwardKL()),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
