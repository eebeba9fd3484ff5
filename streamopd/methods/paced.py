"""PACED (arXiv 2603.11178): what a prompt weighs is how undecided the student is about it; imitate first, then distil on-policy.

    w = x (1 − x), x the share of correct answers;   KL(q‖p) on the teacher's text for half the run, then w KL(p‖q) on the student's
"""

from streamopd.slots import Branch, Coin, ForwardKL, Method, PassRate, ReverseKL, Stage, Union, WrittenBy

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
PACED = Method(
    name="paced",
    summary="forward KL on the teacher's text, then reverse KL on prompts that the student solves sometimes",
    paper="arXiv 2603.11178",
    formula="KL(q‖p), then x(1−x) KL(p‖q)",
    note="x is measured on each group as it is written, not once at the start, so that the first half has no weights.",
    suggests=(("group_size", "8"),),
    stages=(
        Stage(until=0.5, behaviour=Coin(student=0.0), branches=(Branch(support=WIDE, loss=ForwardKL()),)),
        Stage(until=1.0, branches=(Branch(when=WrittenBy("student"), support=WIDE, loss=ReverseKL(), weight=(PassRate(a=1.0, b=1.0),)),)),
    ),
)
