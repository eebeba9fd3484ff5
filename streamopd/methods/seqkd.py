"""Sequence-level knowledge distillation (SeqKD, arXiv 1606.07947): likelihood of what the teacher finds likeliest.

    L = −log p(y_t),   y = argmax q
"""

from streamopd.slots import Branch, Coin, Likelihood, Method

SEQKD = Method(
    name="seqkd",
    summary="baseline: likelihood of the teacher's greedy answers",
    paper="arXiv 1606.07947",
    formula="−log p(y),  y = argmax q",
    note="The teacher's answer is greedy, not the best of a beam.",
    behaviour=Coin(student=0.0, greedy=True),
    branches=(Branch(loss=Likelihood()),),
)
