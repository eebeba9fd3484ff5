"""ExOPD (arXiv 2602.12125): past the teacher, as far again from the reference b (the student at its start) as λ says.

    a_t = λ (log q − log b) − (log p − log b),   λ = 1.25;   at λ = 1 it is `opd`, whatever b is
"""

from streamopd.slots import Branch, Extrapolate, Method, ReverseKL, TruncatedRatio

EXOPD = Method(
    name="exopd",
    summary="policy gradient towards a target beyond the teacher",
    paper="arXiv 2602.12125",
    formula="−r a ∇ log p,  a = λ (log q − log b) − (log p − log b),  λ = 1.25",
    evidence_level="reproduces",
    suggests=(("learn.lr", "1e-5"), ("learn.groups_per_step", "1024"), ("generator.max_completion_length", "16384")),
    branches=(Branch(target=Extrapolate(strength=1.25), loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=5.0),
)
