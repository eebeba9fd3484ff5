"""RLAD (arXiv 2602.22495): GRPO whose trust region lies between the student that wrote and the teacher.

    −clip(r) A log p,   r = (p/mu)^α (p/q)^(1−α),   α = .5

The teacher bounds the step and never turns the sign of a reward.
"""

from streamopd.slots import Advantage, Branch, Method, TeacherRatio

RLAD = Method(
    name="rlad",
    summary="GRPO with the teacher in its ratio",
    paper="arXiv 2602.22495",
    formula="−clip(r) A ∇ log p,  r = (p/mu)^α (p/q)^(1−α)",
    note="After a note; α and the clip of .2 on both sides are ours.",
    suggests=(("generator.temperature", "0.6"),),
    branches=(Branch(loss=Advantage(), form="policy_gradient"),),
    correction=TeacherRatio(alpha=0.5, low=0.2, high=0.2),
)
