"""AdaSwitch (arXiv 2510.07842): the student writes until it goes astray, the teacher finishes.

    hand over where KL(p‖q) > 3 × its mean over the last tokens;   L = KL(q‖p) on the whole text
"""

from streamopd.slots import Branch, ForwardKL, Method, SwitchAtSpike, Union

ADASWITCH = Method(
    name="adaswitch",
    summary="forward KL on answers that the teacher finishes once the student strays",
    paper="arXiv 2510.07842",
    formula="Σ q (log q − log p),  handed over where KL > 3 × running mean",
    note="After a note: the window of 8 tokens is ours; a bound on the union support.",
    behaviour=SwitchAtSpike(factor=3.0, window=8),
    branches=(Branch(support=Union(student_k=16, teacher_k=64, remainder="tail"), loss=ForwardKL()),),
)
