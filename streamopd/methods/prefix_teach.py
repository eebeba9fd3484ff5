"""Prefix teach, suffix fade (arXiv 2605.13643): where the teacher no longer tells the student's candidates apart, it is not asked.

    −r D log p before the change point of the teacher's margin over the student's top 16, 0 after it
"""

from streamopd.slots import Branch, ChangePoint, Method, ReverseKL, TruncatedRatio

PREFIX_TEACH = Method(
    name="prefix_teach",
    summary="log-ratios as rewards until the teacher stops to discriminate",
    paper="arXiv 2605.13643",
    formula="−1[before the change point] r D ∇ log p",
    note="The margin (top minus mean) is our guess, and it is averaged over 16 tokens instead of a sentence.",
    branches=(Branch(loss=ReverseKL(), form="policy_gradient", weight=(ChangePoint(k=16, segment=16, effect=0.5),)),),
    correction=TruncatedRatio(cap=2.0),
)
