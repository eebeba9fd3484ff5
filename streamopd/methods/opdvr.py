"""OPDVR (arXiv 2608.24696): the teacher may praise what was right and blame what was wrong, and nothing else.

    a = max(D, 0) in correct answers, min(D, 0) in wrong ones
"""

from streamopd.slots import Branch, Method, OutcomeGate, ReverseKL, TruncatedRatio

OPDVR = Method(
    name="opdvr",
    summary="log-ratios as rewards, their sign held by the verifier",
    paper="arXiv 2608.24696",
    formula="−r a ∇ log p,  a = max(D, 0) if correct, min(D, 0) if wrong",
    note="After a note; the cap of the ratio is ours.",
    branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(OutcomeGate(),)),),
    correction=TruncatedRatio(cap=2.0),
)
