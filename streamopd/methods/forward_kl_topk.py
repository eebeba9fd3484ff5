"""Forward KL on teacher-64 ∪ student-16 ∪ {sampled} ∪ {stop ids} with a tail bucket: for real vocabularies.

    L = mean over tokens of Σ_{v ∈ S ∪ {tail}} q (log q − log p)

A lower bound of the divergence of GKD with beta = 0 (arXiv 2306.13649).
"""

from streamopd.slots import Branch, ForwardKL, Method, Union

FORWARD_KL_TOPK = Method(
    name="forward_kl_topk",
    summary="forward KL on the union support with a tail bucket",
    paper="arXiv 2306.13649",
    formula="Σ_{v ∈ S ∪ tail} q (log q − log p)",
    evidence_level="inspired by",
    note="A lower bound of the divergence, on the union support.",
    branches=(Branch(support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=ForwardKL()),),
)
