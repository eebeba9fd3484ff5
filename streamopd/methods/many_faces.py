"""The many faces of OPD (arXiv 2605.11182): on a truncated support the gradient runs through the weight alone.

    L = Σ_{v ∈ top-20(p)} p(v) sg[log p(v) − log q(v)]

So the +1 of the derivative, which truncation does not cancel, is gone.
"""

from streamopd.slots import Branch, Method, ReverseKL, StudentTop

MANY_FACES = Method(
    name="many_faces",
    summary="reverse KL on the student's top 20, its log-ratio held fixed",
    paper="arXiv 2605.11182",
    formula="Σ_{v ∈ top-20(p)} p sg[log p − log q]",
    evidence_level="reproduces",
    branches=(Branch(support=StudentTop(20, remainder="drop"), loss=ReverseKL(), form="stop_gradient"),),
)
