"""TSD-KD (arXiv 2603.13260): match where the teacher is surer, sharpen where the student wavers, and rank early candidates alike.

    σ(H(p) − H(q)) JSD_.9 + H(p) above its 10 % quantile + .1 × Plackett–Luce of the top 10 until a tenth of the entropy is spent
"""

from streamopd.slots import JSD, Branch, Early, Entropy, HighEntropy, ListwiseRanking, Method, RelativeConfidence, Union

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
TSD_KD = Method(
    name="tsd_kd",
    summary="confidence-weighted Jensen–Shannon, less entropy, and the teacher's ranking of the student's first candidates",
    paper="arXiv 2603.13260",
    formula="σ(H(p)−H(q)) JSD_.9 + 1[H(p) > Q_.1] H(p) + .1 PL(top-10)",
    note="A bound on the union support, means over all tokens, and the list loss in the order of the paper: the code rewards the reverse.",
    branches=(
        Branch(support=WIDE, loss=JSD(beta=0.9), weight=(RelativeConfidence(),)),
        Branch(when=HighEntropy(quantile=0.1), loss=Entropy()),
        Branch(when=Early(share=0.1), support=WIDE, loss=ListwiseRanking(k=10), scale=0.1),
    ),
)
