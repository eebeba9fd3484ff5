"""Fine-tuning on the teacher's own samples: sequence-level distillation (arXiv 1606.07947) before its approximation by one beam.

    L = −log p(y_t),   y ~ q
"""

from streamopd.slots import Branch, Coin, Likelihood, Method

SFT = Method(
    name="sft",
    summary="baseline: likelihood of the teacher's samples",
    paper="arXiv 1606.07947",
    formula="−log p(y),  y ~ q",
    evidence_level="reproduces",
    behaviour=Coin(student=0.0),
    branches=(Branch(loss=Likelihood()),),
)
