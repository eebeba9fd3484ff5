"""SOD (arXiv 2605.07725): for agents, a teacher counts less after a step that took it where it does not know its way.

    −clip(r) A log p − w_k D log p,   w_k = min(d_1 / d_k, 1.2), d_k the mean |D| of step k
"""

from streamopd.slots import Advantage, Branch, ClippedRatio, Method, ReverseKL, StepRatio

SOD = Method(
    name="sod",
    summary="GRPO, and reverse KL weighted by how far apart both are in each step of the answer",
    paper="arXiv 2605.07725",
    formula="−r A ∇ log p − w_k D ∇ log p,  w_k = min(d_1/d_k, 1.2)",
    note="Both terms share the mean over tokens; an answer without tools is one step, where every w is 1.",
    suggests=(
        ("group_size", "16"), ("learn.groups_per_step", "64"), ("learn.lr", "1e-6"), ("generator.max_completion_length", "20480"),
    ),
    branches=(
        Branch(loss=Advantage(), form="policy_gradient", correction=ClippedRatio(low=0.2, high=0.2)),
        Branch(loss=ReverseKL(), form="policy_gradient", weight=(StepRatio(epsilon=1e-6, delta=0.2),)),
    ),
)
