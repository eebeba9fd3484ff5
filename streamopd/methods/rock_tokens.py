"""Rock tokens (arXiv 2605.09253): ids that hold out against training are frozen once the rest has converged.

    KL(p‖q), and from half the run 0 for the 18 % of ids with the highest mean loss × frequency
"""

from streamopd.slots import Branch, Method, ReverseKL, RockTokens, Stage, Union

SUPPORT = Union(student_k=16, teacher_k=16, remainder="tail")
ROCK_TOKENS = Method(
    name="rock_tokens",
    summary="reverse KL, late without the ids that never yield",
    paper="arXiv 2605.09253",
    formula="Σ p (log p − log q), later 0 for the most stubborn 18 % of ids",
    note="Rocks are found anew in each step instead of over a running record, at half the run instead of at convergence.",
    stages=(
        Stage(until=0.5, branches=(Branch(support=SUPPORT, loss=ReverseKL()),)),
        Stage(until=1.0, branches=(Branch(support=SUPPORT, loss=ReverseKL(), weight=(RockTokens(fraction=0.18),)),)),
    ),
)
