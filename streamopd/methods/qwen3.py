"""Small Qwen3 models (arXiv 2505.09388): first the teacher's answers, then the student's own.

    KL(q‖p) on the teacher's text for half the run, then KL(p‖q) on the student's
"""

from streamopd.slots import Branch, Coin, ForwardKL, Method, ReverseKL, Stage, Union, WrittenBy

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
QWEN3 = Method(
    name="qwen3",
    summary="off-policy, then on-policy distillation",
    paper="arXiv 2505.09388",
    formula="KL(q‖p) on q's text, then KL(p‖q) on p's",
    note="After a note: where the second stage begins, the direction of its KL and both supports are ours.",
    stages=(
        Stage(until=0.5, behaviour=Coin(student=0.0), branches=(Branch(support=WIDE, loss=ForwardKL()),)),
        Stage(until=1.0, branches=(Branch(when=WrittenBy("student"), support=WIDE, loss=ReverseKL()),)),
    ),
)
