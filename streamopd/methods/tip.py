"""TIP (arXiv 2604.14084): half of the tokens are enough, those where the student is unsure or confidently wrong.

    KL(p‖q) on the top half by h + δ − h δ,   h and δ the step's H(p) and KL(p‖q), scaled to [0, 1]
"""

from streamopd.slots import Branch, EntropyOrDivergence, Keep, Method, ReverseKL, Union

TIP = Method(
    name="tip",
    summary="reverse KL on the half of the tokens with entropy or divergence",
    paper="arXiv 2604.14084",
    formula="1[top half by h + δ − hδ] Σ p (log p − log q)",
    note="After a note; both scores are scaled over the step, not a micro-batch; loss and divergence are bounds on the union support.",
    branches=(
        Branch(
            support=Union(student_k=16, teacher_k=16, remainder="tail"), loss=ReverseKL(),
            weight=(Keep(EntropyOrDivergence(), fraction=0.5, over="step"),),
        ),
    ),
)
