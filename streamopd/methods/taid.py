"""TAID (arXiv 2501.16937): the target moves from the student to the teacher.

    L = KL(Q‖p),   Q = softmax((1−t) log p + t log q),   t from .4 to 1
"""

from streamopd.slots import Branch, ForwardKL, Interpolate, Linear, Method, Union

TAID = Method(
    name="taid",
    summary="forward KL to a target that moves from student to teacher",
    paper="arXiv 2501.16937",
    formula="KL(Q‖p),  Q ∝ p^(1−t) q^t,  t .4 → 1",
    note="t is linear, the least that the paper allows, without the momentum of the loss; the tail is interpolated as a whole.",
    branches=(
        Branch(
            target=Interpolate(t=Linear(0.4, 1.0)), support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=ForwardKL()
        ),
    ),
)
