"""Rock tokens (arXiv 2605.09253): ids that hold out against training are frozen once the rest has converged.

    KL(p‖q), and from a plateau of the loss on, or half the run, 0 for the 18 % of ids with the highest mean loss × frequency
"""

from streamopd.slots import Branch, Method, Plateau, ReverseKL, RockTokens, Stage, Union

SUPPORT = Union(student_k=16, teacher_k=16, remainder="tail")
ROCK_TOKENS = Method(
    name="rock_tokens",
    summary="reverse KL, late without the ids that never yield",
    paper="arXiv 2605.09253",
    formula="Σ p (log p − log q), later 0 for the most stubborn 18 % of ids",
    note="Rocks are found anew in each step, not over a running record; how convergence is told is ours, at half the run at the latest.",
    stages=(
        Stage(until=0.5, plateau=Plateau(figure="loss"), branches=(Branch(support=SUPPORT, loss=ReverseKL()),)),
        Stage(until=1.0, branches=(Branch(support=SUPPORT, loss=ReverseKL(), weight=(RockTokens(fraction=0.18),)),)),
    ),
)
