"""Rethinking OPD (arXiv 2604.13016): every one of the student's own top 16 gets its coefficient, not the written token alone.

    ∇L = −Σ_{v ∈ top-16(p)} sg[p(v) / p(S)] (log q − log p)(v) ∇ log p(v)
"""

from streamopd.slots import Branch, Method, ReverseKL, StudentTop

RETHINKING = Method(
    name="rethinking",
    summary="a policy gradient over the student's own sixteen candidates",
    paper="arXiv 2604.13016",
    formula="−Σ_{v ∈ top-16(p)} p/p(S) (log q − log p) ∇ log p",
    evidence_level="reproduces",
    note="With one gradient step a batch the paper's clip of the candidates' ratios has nothing to clip; its cold start is a run before.",
    suggests=(("group_size", "4"), ("learn.groups_per_step", "16"), ("learn.lr", "1e-6"), ("generator.max_completion_length", "7168")),
    branches=(Branch(support=StudentTop(16, remainder="drop"), loss=ReverseKL(), form="per_candidate"),),
)
