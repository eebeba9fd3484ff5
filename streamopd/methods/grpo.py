"""GRPO (arXiv 2402.03300): the verifier alone, each answer against the others of its group.

    −clip(r, ±.2) A log p,   A = (reward − mean) / std of the group, the mean of each answer
"""

from streamopd.slots import Advantage, Branch, ClippedRatio, Method

GRPO = Method(
    name="grpo",
    summary="baseline: reinforcement learning from the verifier, no teacher",
    paper="arXiv 2402.03300",
    formula="−clip(r) A ∇ log p",
    note="Without the KL to a reference, which needs a second model and is mostly left out since.",
    suggests=(("group_size", "64"), ("learn.groups_per_step", "16"), ("learn.lr", "1e-6"), ("generator.max_completion_length", "1024")),
    branches=(Branch(loss=Advantage("grpo"), form="policy_gradient"),),
    correction=ClippedRatio(low=0.2, high=0.2),
    reduce="answer_mean",
)
