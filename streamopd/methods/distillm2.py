"""DistiLLM-2 (arXiv 2503.07067): the teacher's answer is pulled up, the student's to the same prompt pushed down.

    L = (2−β) KL(q ‖ α q + (1−α) p) on teacher text + β KL(p ‖ (1−α) q + α p) on student text,   β from 1 to 1.5 by half the run
"""

from streamopd.slots import Branch, Linear, Members, Method, SkewForward, SkewReverse, Union, WrittenBy

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
DISTILLM2 = Method(
    name="distillm2",
    summary="skewed forward KL on the teacher's answer, skewed reverse KL on the student's",
    paper="arXiv 2503.07067",
    formula="(2−β) SKL(teacher text) + β SRKL(student text),  β 1 → 1.5",
    note="One α = .1 for all instead of one for each answer; a bound on the union support.",
    suggests=(("group_size", "2"),),
    behaviour=Members("teacher"),
    branches=(
        Branch(when=WrittenBy("teacher"), support=WIDE, loss=SkewForward(alpha=0.1), scale=Linear(1.0, 0.5, until=0.5)),
        Branch(when=WrittenBy("student"), support=WIDE, loss=SkewReverse(alpha=0.1), scale=Linear(1.0, 1.5, until=0.5)),
    ),
)
