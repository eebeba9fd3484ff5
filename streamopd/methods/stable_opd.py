"""Stable-OPD (arXiv 2604.08527): against runaway lengths, one golden answer a prompt to imitate, and a leash to the start.

    L = −clip(r) D log p on the student's text − λ log p on the golden answer + β KL(p‖b)
"""

from streamopd.slots import Branch, ClippedRatio, Likelihood, Members, Method, ReferenceKL, ReverseKL, Union, WrittenBy

STABLE_OPD = Method(
    name="stable_opd",
    summary="policy gradient of reverse KL, a golden answer in every group, a leash to the reference",
    paper="arXiv 2604.08527",
    formula="−r D ∇ log p − λ ∇ log p(golden) + β ∇ KL(p‖b)",
    note="After a note; the golden answer is the dataset's; λ = .1 and β = .001 are ours: the paper's were not found.",
    suggests=(("group_size", "5"), ("learn.groups_per_step", "64"), ("learn.lr", "1e-6")),
    behaviour=Members("gold"),
    branches=(
        Branch(when=WrittenBy("student"), loss=ReverseKL(), form="policy_gradient"),
        Branch(when=WrittenBy("gold"), loss=Likelihood(), scale=0.1),
        Branch(support=Union(student_k=0, teacher_k=16), loss=ReferenceKL(), scale=1e-3),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
