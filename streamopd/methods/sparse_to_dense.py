"""Sparse to dense (arXiv 2605.12483): labels are for the teacher; the student imitates, distils on-policy, and meets labels last.

    KL(q‖p) on the teacher's text, then KL(p‖q) on the student's, then −clip(r) A log p

The teacher's own reinforcement learning is a run before this one: method = "grpo".
"""

from streamopd.slots import Advantage, Branch, ClippedRatio, Coin, ForwardKL, Method, ReverseKL, Stage, Union, WrittenBy

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
SPARSE_TO_DENSE = Method(
    name="sparse_to_dense",
    summary="forward KL on the teacher's text, reverse KL on the student's, then GRPO",
    paper="arXiv 2605.12483",
    formula="KL(q‖p) on q's text, then KL(p‖q) on p's, then −r A ∇ log p",
    note="After a note: where the stages change (a quarter, three quarters) is ours.",
    stages=(
        Stage(until=0.25, behaviour=Coin(student=0.0), branches=(Branch(support=WIDE, loss=ForwardKL()),)),
        Stage(until=0.75, branches=(Branch(when=WrittenBy("student"), support=WIDE, loss=ReverseKL()),)),
        Stage(until=1.0, branches=(Branch(when=WrittenBy("student"), loss=Advantage(), form="policy_gradient"),)),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
