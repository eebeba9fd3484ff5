"""MiniLLM (arXiv 2306.08543): reverse KL of whole answers, its next-token term exact, its future by policy gradient.

    ∇L = ∇ KL(p‖q) at t − E[r_t R_{t+1} ∇ log p(y_t)],   R the mean of D over what follows;   y ~ .2 q + .8 p
"""

from streamopd.slots import Branch, ClippedRatio, Method, Mixture, Return, ReverseKL, Union

WIDE = Union(student_k=16, teacher_k=64, remainder="tail")
MINILLM = Method(
    name="minillm",
    summary="sequence-level reverse KL: the next token exactly, what follows by policy gradient, the teacher mixed in while writing",
    paper="arXiv 2306.08543",
    formula="∇ KL(p‖q)_t − r R_{t+1} ∇ log p,  R the length-normalised return of D,  mu = .2 q + .8 p",
    note="Without the language-model loss on plain text; the next-token term is a bound on the union support and carries no ratio.",
    suggests=(("generator.temperature", "1.0"),),
    behaviour=Mixture(alpha=0.2),
    branches=(
        Branch(support=WIDE, loss=ReverseKL()),
        Branch(loss=ReverseKL(), form="policy_gradient", shape=(Return(gamma=1.0, normalised=True, future=True),)),
    ),
    correction=ClippedRatio(low=0.2, high=0.2),
)
