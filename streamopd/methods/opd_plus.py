"""OPD+ (arXiv 2606.01039): any f-divergence as a policy gradient, with the term that a held advantage leaves out.

    a = u f'(u) − f(u),   u = q/p;   Jensen–Shannon: a = .5 log((1 + u) / 2)
"""

from streamopd.slots import JSD, Branch, Clip, Method, TruncatedRatio

OPD_PLUS = Method(
    name="opd_plus",
    summary="the unbiased policy gradient of the Jensen–Shannon divergence",
    paper="arXiv 2606.01039",
    formula="−r a ∇ log p,  a = u f'(u) − f(u)",
    note="The log-ratio is not clipped at ±6, but the coefficient at what that comes to.",
    branches=(Branch(loss=JSD(beta=0.5), form="policy_gradient", shape=(Clip(limit=2.65),)),),
    correction=TruncatedRatio(cap=2.0),
)
