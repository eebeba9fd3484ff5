"""Fine-tuning on a dataset's own answers: the supervised baseline of GKD (arXiv 2306.13649), which asks no teacher.

    L = −log p(y_t),   y of the dataset
"""

from streamopd.slots import Branch, Coin, Likelihood, Method

SFT_GOLD = Method(
    name="sft_gold",
    summary="baseline: likelihood of the dataset's answers",
    paper="arXiv 2306.13649",
    formula="−log p(y),  y of the dataset",
    evidence_level="reproduces",
    behaviour=Coin(student=0.0, author="gold"),
    branches=(Branch(loss=Likelihood()),),
)
