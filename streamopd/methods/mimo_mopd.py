"""MOPD of MiMo-V2-Flash (arXiv 2601.02780): the teacher of the prompt's own domain, and the verifier beside it.

    −g(r) (D + α A) log p,   D by the domain's teacher, g(r) = r inside a band and 0 outside, the mean of each answer
"""

from streamopd.slots import Advantage, Branch, HardGate, Method, ReverseKL, Routed

MIMO_MOPD = Method(
    name="mimo_mopd",
    summary="routed teachers' log-ratios and the verifier's advantage as rewards",
    paper="arXiv 2601.02780",
    formula="−g(r) (D + α A) ∇ log p",
    note="The band [.5, 2] and α = 1 are ours: the report does not give its own.",
    teachers=Routed(),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"), Branch(loss=Advantage(), form="policy_gradient", scale=1.0)),
    correction=HardGate(low=0.5, high=2.0),
    reduce="answer_mean",
)
