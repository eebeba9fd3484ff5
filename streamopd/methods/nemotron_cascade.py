"""MOPD of Nemotron-Cascade 2 (arXiv 2603.19220): routed teachers, and a hard gate for tokens that another student wrote.

    −g(r) D log p,   g(r) = r where .5 ≤ r ≤ 2, else 0
"""

from streamopd.slots import Branch, HardGate, Method, ReverseKL, Routed

NEMOTRON_CASCADE = Method(
    name="nemotron_cascade",
    summary="routed teachers' log-ratios as rewards, stale tokens gated out",
    paper="arXiv 2603.19220",
    formula="−r 1[.5 ≤ r ≤ 2] D ∇ log p",
    note="After a note on the report.",
    suggests=(("learn.groups_per_step", "128"), ("group_size", "4"), ("learn.lr", "2e-6"), ("learn.max_steps", "50")),
    teachers=Routed(),
    branches=(Branch(loss=ReverseKL(), form="policy_gradient"),),
    correction=HardGate(low=0.5, high=2.0),
)
