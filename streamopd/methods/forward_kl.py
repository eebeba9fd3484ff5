"""Forward KL on the student's own samples over the whole vocabulary (GKD with beta = 0 and lmbda = 1, arXiv 2306.13649).

    L = mean over tokens of Σ_v q (log q − log p)

Exact, for vocabularies small enough to send [G, V].
"""

from streamopd.slots import Branch, ForwardKL, FullVocabulary, Method

FORWARD_KL = Method(
    name="forward_kl",
    summary="forward KL over the whole vocabulary",
    paper="arXiv 2306.13649",
    formula="Σ_v q (log q − log p)",
    evidence_level="reproduces",
    branches=(Branch(support=FullVocabulary(), loss=ForwardKL()),),
)
