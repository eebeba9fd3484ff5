"""HPD (arXiv 2604.20244): on somebody else's text, the written token is told up or down, and so is the student's own guess.

    a₁ = p (log q − log p) of the written token, q added where it gains;   a₂ = min(p (log q − log p), 0) of the likeliest other
"""

from streamopd.slots import Branch, Coin, GoldOrGuess, Method, Union

HPD = Method(
    name="hpd",
    summary="reweighted likelihood of the written token and of the student's own guess",
    paper="arXiv 2604.20244",
    formula="−a₁ ∇ log p(y) − a₂ ∇ log p(y′),  a = p (log q − log p)",
    note="The text is the teacher's own instead of a dataset's, which Coin(student=0.0, author=\"gold\") would take.",
    behaviour=Coin(student=0.0),
    branches=(Branch(support=Union(student_k=16, teacher_k=16), loss=GoldOrGuess()),),
)
