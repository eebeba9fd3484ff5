"""GKD (arXiv 2306.13649) with a dataset's answers: any divergence, on a mixture of the student's text and the dataset's.

    L = β KL(q‖m) + (1−β) KL(p‖m),   m = β q + (1−β) p,   β = .5;   the student's own text with probability λ = .5

`lmbda` of TRL's GKDTrainer is λ, its `seq_kd` is `gkd`.
"""

from streamopd.slots import JSD, Branch, Coin, Method, Union

GKD_GOLD = Method(
    name="gkd_gold",
    summary="generalised Jensen–Shannon divergence, half of the answers the student's, half the dataset's",
    paper="arXiv 2306.13649",
    formula="β KL(q‖m) + (1−β) KL(p‖m),  m = β q + (1−β) p",
    note="A bound on the union support; the coin falls for each answer, not each step.",
    suggests=(("generator.temperature", "0.9"),),
    behaviour=Coin(student=0.5, author="gold"),
    branches=(Branch(support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=JSD(beta=0.5)),),
)
