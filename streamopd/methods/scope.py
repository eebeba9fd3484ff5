"""SCOPE (arXiv 2604.10688): correct answers are repeated, wrong ones corrected, each by how much it has to say in its group.

    correct: −w log p, w = n softmax(−mean log p);   wrong: −w r D log p, w = n softmax(mean log q)
"""

from streamopd.slots import Branch, Correct, GroupSoftmax, Incorrect, Likelihood, Method, ReverseKL, TruncatedRatio

SCOPE = Method(
    name="scope",
    summary="likelihood of surprising correct answers, distillation of wrong ones that the teacher understands",
    paper="arXiv 2604.10688",
    formula="correct: −w ∇ log p;  wrong: −w r D ∇ log p",
    evidence_level="reproduces",
    branches=(
        Branch(when=Correct(), loss=Likelihood(), weight=(GroupSoftmax("student_surprise", temperature=1.0),)),
        Branch(
            when=Incorrect(), loss=ReverseKL(), form="policy_gradient",
            weight=(GroupSoftmax("teacher_likelihood", temperature=1.0),),
        ),
    ),
    correction=TruncatedRatio(cap=2.0),
)
