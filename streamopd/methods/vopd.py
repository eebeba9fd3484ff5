"""vOPD (arXiv 2605.07865): the value of a state is known in closed form, −KL(p‖q), and is taken off the reward.

    a_t = D_t + KL(p‖q),   the KL on the student's top 100, both sides renormalised;   E_p[a] = 0
"""

from streamopd.slots import Baseline, Branch, ClippedRatio, Method, ReverseKL

VOPD = Method(
    name="vopd",
    summary="the policy gradient of reverse KL with its exact baseline",
    paper="arXiv 2605.07865",
    formula="−r (D + KL_top-100(p‖q)) ∇ log p",
    evidence_level="reproduces",
    suggests=(
        ("learn.lr", "1e-5"), ("learn.lora.rank", "64"), ("learn.lora.alpha", "128"), ("learn.groups_per_step", "64"),
        ("generator.max_completion_length", "2048"),
    ),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(Baseline(k=100),)),),
    correction=ClippedRatio(low=0.2, high=0.2),
)
