"""Early-stopping rollout (ESR, arXiv 2605.27028): a hundred tokens of an answer teach as much as all of it.

    −r D log p on the first 100 tokens, written no further
"""

from streamopd.slots import Branch, Method, ReverseKL, TruncatedRatio, Until

ESR = Method(
    name="esr",
    summary="log-ratios as rewards on the first hundred tokens",
    paper="arXiv 2605.27028",
    formula="−r D ∇ log p,  t < 100",
    note="After a survey and an audit, whose horizon of 100 tokens this is.",
    behaviour=Until(tokens=100.0),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"),),
    correction=TruncatedRatio(cap=2.0),
)
