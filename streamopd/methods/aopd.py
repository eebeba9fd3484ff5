"""AOPD (arXiv 2605.06387): tokens that the teacher likes better are rewarded, at the others the teacher is imitated.

    q(y) > p(y): −r D log p(y);   else KL(q‖p) on the teacher's top 16
"""

from streamopd.slots import Branch, ForwardKL, Method, ReverseKL, TeacherPrefers, TeacherTop, TruncatedRatio

AOPD = Method(
    name="aopd",
    summary="reward what the teacher prefers, imitate it elsewhere",
    paper="arXiv 2605.06387",
    formula="q > p: −r D ∇ log p;  else ∇ Σ_{v ∈ top-16(q) ∪ tail} q (log q − log p)",
    note="After a note: how many ids the paper takes and what it does with the rest is not known to us.",
    branches=(
        Branch(when=TeacherPrefers(margin=0.0), loss=ReverseKL(), form="policy_gradient"),
        Branch(support=TeacherTop(16, remainder="tail"), loss=ForwardKL()),
    ),
    routing="exclusive",
    correction=TruncatedRatio(cap=2.0),
)
