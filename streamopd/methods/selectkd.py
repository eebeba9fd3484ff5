"""SelecTKD (arXiv 2510.24021): the student is taught in full where the teacher accepts its own first choice.

    w KL(p‖q),   w = 1 where argmax p is in the teacher's top 5, .01 elsewhere
"""

from streamopd.slots import Branch, Method, ReverseKL, TeacherAccepts, Union

SELECTKD = Method(
    name="selectkd",
    summary="reverse KL, hardly any where the teacher would not accept the student's first choice",
    paper="arXiv 2510.24021",
    formula="w Σ p (log p − log q),  w = 1 if argmax p ∈ top-5(q), else .01",
    note="After a note on the weight; the divergence that it weighs is the default's, on the student's own text.",
    branches=(
        Branch(
            support=Union(student_k=16, teacher_k=16, remainder="tail"), loss=ReverseKL(),
            weight=(TeacherAccepts(k=5, otherwise=0.01),),
        ),
    ),
)
