"""KDRL (arXiv 2506.02208): GRPO, and distillation of the wrong answers, ever less of it.

    −clip(r) A log p + β 1[wrong] ½ D²,   β from .005 to .001;   the gradient of ½ D² is that of −sg[D] log p
"""

from streamopd.slots import Advantage, Branch, ClippedRatio, Incorrect, Linear, Method, ReverseKL

KDRL = Method(
    name="kdrl",
    summary="GRPO with a fading reverse KL on wrong answers",
    paper="arXiv 2506.02208",
    formula="−r A ∇ log p − β 1[wrong] D ∇ log p,  β .005 → .001",
    note="After a note; β falls over the run instead of by 5e-5 a step.",
    branches=(
        Branch(loss=Advantage(), form="policy_gradient", correction=ClippedRatio(low=0.2, high=0.2)),
        Branch(when=Incorrect(), loss=ReverseKL(), form="policy_gradient", scale=Linear(5e-3, 1e-3)),
    ),
)
