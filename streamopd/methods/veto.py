"""Veto (arXiv 2601.07155): the target is a product of teacher and student, until the student can reach everything.

    L = KL(Q‖p),   Q ∝ q sg(p)^β,   β from .5 to 0
"""

from streamopd.slots import Branch, ForwardKL, Linear, Method, Union, Veto

VETO = Method(
    name="veto",
    summary="forward KL to teacher times student, the student's share fading",
    paper="arXiv 2601.07155",
    formula="KL(Q‖p),  Q ∝ q p^β,  β .5 → 0",
    note="The first β is ours, and on the union support's tail the product is one of masses.",
    branches=(
        Branch(
            target=Veto(beta=Linear(0.5, 0.0)), support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=ForwardKL()
        ),
    ),
)
