"""On-policy distillation as Thinking Machines ran it (blog of October 2025, Tinker cookbook): reverse KL as a reward of each token.

    ∇L = −E[r_t D_t ∇ log p(y_t)],   D_t = log q(y_t) − log p(y_t),   r = p / mu

One number a token is all that it asks of a teacher: the point from which the other policy gradients here depart.
"""

from streamopd.slots import Branch, Method, ReverseKL, TruncatedRatio

OPD = Method(
    name="opd",
    summary="the teacher's log-ratio of each written token as its reward",
    paper="Thinking Machines 2025",
    formula="−r D ∇ log p,  D = log q − log p of the written token",
    evidence_level="reproduces",
    note="Exactly so in a synchronous run; with staleness D is under the live student, not under the one that wrote, and r ends at 2.",
    suggests=(("max_staleness", "0"), ("learn.lr", "1e-4"), ("learn.lora.rank", "128"), ("learn.groups_per_step", "512")),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=2.0),
)
