"""TrOPD (arXiv 2606.01249): a token is trusted with probability min(q/p, 1); outliers are imitated, not punished.

    trusted: −r D log p;   else Σ_{v ∈ top-64(q)} q (log q − log p);   .001 of that on a prefix by the teacher, which fades
"""

from streamopd.slots import Branch, Cosine, ForwardKL, Method, ReverseKL, TeacherPrefix, TeacherTop, TruncatedRatio, Trusted, WrittenBy

IMITATED = TeacherTop(64, remainder="drop")
TROPD = Method(
    name="tropd",
    summary="speculative decoding's test decides between policy gradient and forward KL; the teacher writes fading prefixes",
    paper="arXiv 2606.01249",
    formula="u < min(q/p, 1): −r D ∇ log p;  else ∇ Σ_{v ∈ top-64(q)} q (log q − log p)",
    note="After a note; the first length of the teacher's prefix is ours.",
    suggests=(
        ("learn.lr", "5e-6"), ("learn.max_steps", "200"), ("learn.groups_per_step", "128"), ("group_size", "4"),
        ("generator.max_completion_length", "8192"),
    ),
    behaviour=TeacherPrefix(tokens=Cosine(32.0, 0.0)),
    branches=(
        Branch(when=WrittenBy("teacher"), support=IMITATED, loss=ForwardKL(), scale=1e-3),
        Branch(when=Trusted(), loss=ReverseKL(), form="policy_gradient"),
        Branch(support=IMITATED, loss=ForwardKL()),
    ),
    routing="exclusive",
    correction=TruncatedRatio(cap=2.0),
)
