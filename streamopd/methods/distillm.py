"""DistiLLM (arXiv 2402.03898): a skewed reverse KL, whose ratio is bounded, and ever more of the student's own answers.

    L = KL(p ‖ (1−α) q + α p) ≤ −log α,   α = .1
"""

from streamopd.slots import Branch, Coin, Linear, Method, SkewReverse, Union

DISTILLM = Method(
    name="distillm",
    summary="skewed reverse KL, from the teacher's answers to the student's",
    paper="arXiv 2402.03898",
    formula="KL(p ‖ (1−α) q + α p),  α = .1",
    note="The student's share grows with progress, not when validation stalls; no replay of old answers; a bound on the union support.",
    behaviour=Coin(student=Linear(0.0, 1.0)),
    branches=(Branch(support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=SkewReverse(alpha=0.1)),),
)
