"""The default of late 2026: reverse KL on student-16 ∪ teacher-16 ∪ {sampled} ∪ {stop ids} with a tail bucket.

    L = mean over tokens of Σ_{v ∈ S ∪ {tail}} p (log p − log q),  back-propagated directly

A lower bound of KL(p‖q), printed as `kl_bound`. Tail bucket: arXiv 2608.14728; union: measured, see docs/architecture.md.
"""

from streamopd.slots import Branch, Method, ReverseKL, Union

DEFAULT = Method(
    name="default",
    summary="reverse KL on the union support with a tail bucket",
    paper="arXiv 2608.14728",
    formula="Σ_{v ∈ S ∪ tail} p (log p − log q)",
    evidence_level="default",
    branches=(Branch(support=Union(student_k=16, teacher_k=16, remainder="tail"), loss=ReverseKL()),),
)
