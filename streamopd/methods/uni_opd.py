"""Uni-OPD (arXiv 2605.03677): a teacher that likes wrong answers better than correct ones is put right, group by group.

    a = D ± ½ max(0, δ − (mean D of correct − mean D of wrong)),   δ = .4;   |a| ≥ 10 is dropped;   as many correct as wrong
"""

from streamopd.slots import Balance, Branch, ClippedRatio, DropBeyond, MarginShift, Method, ReverseKL

UNI_OPD = Method(
    name="uni_opd",
    summary="log-ratios as rewards, correct and wrong answers of a group kept a margin apart",
    paper="arXiv 2605.03677",
    formula="−r a ∇ log p,  a = D ± ½ max(0, δ − gap),  δ = .4",
    note="Prompts of medium difficulty are not drawn more often; |a| ≥ 10 is dropped after the shift; balance keeps the first of each.",
    suggests=(
        ("group_size", "16"), ("learn.groups_per_step", "64"), ("learn.lr", "1e-6"), ("learn.weight_decay", "0.1"),
        ("generator.max_completion_length", "16384"),
    ),
    select=Balance(),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient", shape=(MarginShift(margin=0.4), DropBeyond(limit=10.0))),),
    correction=ClippedRatio(low=0.2, high=0.28),
)
