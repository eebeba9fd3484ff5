"""LUFFY (arXiv 2504.14945): one answer of each group is the teacher's, and counts in the group's advantages.

    student's tokens: −clip(r) A log p;   the teacher's: −A p / (p + γ), γ = .1, no clip
"""

from streamopd.slots import Advantage, Branch, ClippedRatio, Members, Method, OffPolicyShape, WrittenBy

LUFFY = Method(
    name="luffy",
    summary="GRPO with one answer of each group by the teacher",
    paper="arXiv 2504.14945",
    formula="−r A ∇ log p;  the teacher's tokens: −A ∇ p/(p + γ)",
    note="After a note; the mean is over all tokens of the step, and the teacher writes now: no traces of it are read.",
    suggests=(("group_size", "8"),),
    behaviour=Members("teacher"),
    branches=(
        Branch(when=WrittenBy("student"), loss=Advantage(), form="policy_gradient"),
        Branch(when=WrittenBy("teacher"), loss=Advantage(), form="policy_gradient", shape=(OffPolicyShape(gamma=0.1),)),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
