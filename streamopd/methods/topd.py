"""Truncated OPD (TOPD, arXiv 2605.31490): a quarter of the longest answer is enough.

    −r D log p on the first H = ρ T tokens, written no further;   ρ = .25 of T = 16,384
"""

from streamopd.slots import Branch, Method, ReverseKL, TruncatedRatio, Until

TOPD = Method(
    name="topd",
    summary="log-ratios as rewards on the first quarter of the longest answer",
    paper="arXiv 2605.31490",
    formula="−r D ∇ log p,  t < ρ T",
    note="After notes; H is a number of tokens here: where generator.max_completion_length is not 16,384, set a quarter of yours.",
    suggests=(("group_size", "4"), ("learn.groups_per_step", "64"), ("generator.max_completion_length", "16384")),
    behaviour=Until(tokens=4096.0),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=2.0),
)
