"""The pool of DeepSeek-V4 (arXiv 2606.19348): many experts at once, over the whole vocabulary, from their cached hidden states.

    Σ_k w_k KL(p‖q_k) = KL(p‖g) − log Z,   g ∝ Π q_k^w_k
"""

from streamopd.slots import Branch, FullVocabulary, Method, Pool, ReverseKL

DEEPSEEK_V4 = Method(
    name="deepseek_v4",
    summary="exact reverse KL to the geometric pool of all teachers",
    paper="arXiv 2606.19348",
    formula="Σ_k w_k KL(p‖q_k)",
    note="After a note: equal weights are ours; the value differs by log Z, the gradient does not.",
    teachers=Pool("geometric"),
    branches=(Branch(support=FullVocabulary(by="hidden"), loss=ReverseKL()),),
)
