"""PowerOPD (arXiv 2606.17199): a reward that cannot explode.

    a = q^½ − p^½ of the written token, in [−1, 1]
"""

from streamopd.slots import Branch, Method, Power, TruncatedRatio

POWER_OPD = Method(
    name="power_opd",
    summary="the difference of square roots of both probabilities as the token's reward",
    paper="arXiv 2606.17199",
    formula="−r (q^a − p^a) ∇ log p,  a = .5",
    note="After a note: the exponent of a half is ours.",
    branches=(Branch(loss=Power(exponent=0.5), form="policy_gradient"),),
    correction=TruncatedRatio(cap=2.0),
)
