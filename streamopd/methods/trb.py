"""Trust-region behaviour blending (arXiv 2605.31159): while it warms up the student is led by the hand, the loss stays the same.

    mu ∝ p^(1−β) q^β, the nearest to q with KL(mu‖p) ≤ ε;   ε from .05 to 0;   L = Σ_{v ∈ top-16(p) ∪ tail} p (log p − log q)
"""

from streamopd.slots import Branch, GeometricBlend, Linear, Method, ReverseKL, StudentTop

TRB = Method(
    name="trb",
    summary="reverse KL on text written inside a trust region towards the teacher, which closes",
    paper="arXiv 2605.31159",
    formula="Σ_{v ∈ top-16(p) ∪ tail} p (log p − log q),  mu ∝ p^(1−β) q^β",
    note="After a note: the first ε, the length of the warm-up (a fifth of the run) and the tail are ours.",
    behaviour=GeometricBlend(epsilon=Linear(0.05, 0.0, until=0.2)),
    branches=(Branch(support=StudentTop(16, remainder="tail"), loss=ReverseKL()),),
)
