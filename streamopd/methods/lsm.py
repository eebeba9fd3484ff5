"""Local support matching (Revisiting OPD, arXiv 2603.25562): reverse KL on the teacher's own top 32, both sides renormalised.

    L = Σ_{v ∈ top-32(q)} p̂ (log p̂ − log q̂)

Its answers want generator.top_p = 0.9; without renormalisation or nucleus the paper saw it collapse.
"""

from streamopd.slots import Branch, Method, ReverseKL, TeacherTop

LSM = Method(
    name="lsm",
    summary="reverse KL on the teacher's local support, renormalised",
    paper="arXiv 2603.25562",
    formula="Σ_{v ∈ top-32(q)} p̂ (log p̂ − log q̂)",
    evidence_level="reproduces",
    suggests=(
        ("generator.top_p", "0.9"), ("group_size", "8"), ("learn.groups_per_step", "16"), ("learn.lr", "1e-6"),
        ("generator.max_completion_length", "16384"),
    ),
    branches=(Branch(support=TeacherTop(32, remainder="renorm"), loss=ReverseKL()),),
)
