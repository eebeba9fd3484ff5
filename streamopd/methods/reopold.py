"""REOPOLD (arXiv 2603.11137): the log-ratio as a reward with a floor; first every token above it, then the uncertain half.

    −Σ M r max(D, F) ∇ log p / Σ M,   F = log λ / (1−λ), λ = .2;   M: D ≥ F until half the run, then the top half by H(p)
"""

from streamopd.slots import AtLeastFloor, Branch, EntropyScore, Floor, Keep, Method, ReverseKL, Stage, TruncatedRatio

EXPLORE, REFINE = AtLeastFloor(skew=0.2), Keep(EntropyScore(), fraction=0.5)
REOPOLD = Method(
    name="reopold",
    summary="log-ratios floored as rewards; explore, then refine where the student is unsure",
    paper="arXiv 2603.11137",
    formula="−Σ M r max(D, F) ∇ log p / Σ M,  F = log λ/(1−λ),  λ = .2",
    note="After two notes on the paper; its ratio is not capped, here at 2.",
    suggests=(("generator.temperature", "0.6"),),
    stages=(
        Stage(until=0.5, branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(Floor(skew=0.2),), weight=(EXPLORE,)),)),
        Stage(until=1.0, branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(Floor(skew=0.2),), weight=(REFINE,)),)),
    ),
    correction=TruncatedRatio(cap=2.0),
)
