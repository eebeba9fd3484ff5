"""TGPO (arXiv 2605.13230): GRPO, and at every prefix of the student's the token that the teacher would have written.

    −clip(r) A log p − w log p(argmax q) + β KL(p‖b),   w to 0 by step 200
"""

from streamopd.slots import Advantage, ArgmaxCrossEntropy, Branch, ClippedRatio, Linear, Method, ReferenceKL, Union

NEAR = Union(student_k=0, teacher_k=16)
TGPO = Method(
    name="tgpo",
    summary="GRPO with a fading cross-entropy to the teacher's next token",
    paper="arXiv 2605.13230",
    formula="−r A ∇ log p − w ∇ log p(argmax q) + β ∇ KL(p‖b),  w .1 → 0",
    note="After a note: the first w and β are ours, w fades over the run, and the leash is a bound on the reference's top 16.",
    suggests=(("learn.max_steps", "200"),),
    branches=(
        Branch(loss=Advantage(), form="policy_gradient"),
        Branch(support=NEAR, loss=ArgmaxCrossEntropy(), scale=Linear(0.1, 0.0)),
        Branch(support=NEAR, loss=ReferenceKL(), scale=1e-3),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
