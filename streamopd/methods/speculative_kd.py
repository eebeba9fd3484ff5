"""Speculative KD (arXiv 2410.11325): the student proposes, the teacher rewrites what is not in its own top 25.

    y_t ~ p, kept when it is in the teacher's top 25, else drawn from q;   L = KL(q‖p) on the interleaved text
"""

from streamopd.slots import Branch, ForwardKL, Interleave, Method, Union

SPECULATIVE_KD = Method(
    name="speculative_kd",
    summary="forward KL on text whose implausible tokens the teacher replaced while it was written",
    paper="arXiv 2410.11325",
    formula="Σ q (log q − log p),  y_t ~ p if in top-25(q), else ~ q",
    note="A bound on the union support; how the paper draws the replacement is known from a note only.",
    behaviour=Interleave(k=25),
    branches=(Branch(support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=ForwardKL()),),
)
