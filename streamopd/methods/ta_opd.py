"""TA-OPD (arXiv 2605.26844): teachable tokens only, where both disagree and the teacher still knows the student's candidates.

    KL(p‖q) on the top tenth by disagreement × q(top-16(p)), both scaled by their 5 % and 95 % quantiles
"""

from streamopd.slots import Branch, Keep, Method, ReverseKL, Teachability, Union

TA_OPD = Method(
    name="ta_opd",
    summary="reverse KL on the most teachable tenth of the tokens",
    paper="arXiv 2605.26844",
    formula="1[top tenth by D̃ C̃] Σ p (log p − log q)",
    note="After a note; disagreement and loss are bounds on the union support.",
    branches=(
        Branch(
            support=Union(student_k=16, teacher_k=16, remainder="tail"), loss=ReverseKL(),
            weight=(Keep(Teachability(), fraction=0.1, over="step"),),
        ),
    ),
)
