"""Where TRL has the same loss, ours is the same: values, and gradients with respect to the student.

TRL's functions take logits, or hidden states and heads; ours cells of one partition. Temperature is theirs alone: ours are
given logits that it has divided. TRL 1.16 has no MiniLLM trainer any more; its top-k with a tail stands in four files, of which
one that both directions and mixtures go through (IW-OPD), one over the student's ids (SDFT), and one over ragged candidates
(asynchronous distillation) are compared.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from streamopd.learn.objective.cells import Target, partition
from streamopd.learn.objective.divergence import coefficient, diverge
from streamopd.slots import JSD, FullVocabulary, ReverseKL, StudentTop, Support, TeacherTop, Union
from streamopd.slots.support import Remainder

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental.")]

SHAPE = (3, 11)  # answers, tokens
VOCABS = (2, 7, 64, 1000)
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)
HIDDEN_SIZE = 8


class Case(NamedTuple):
    """Two random speakers over one vocabulary, and the tokens that count."""

    student: Tensor  # [B, T, V] logits, with gradient
    teacher: Tensor  # [B, T, V] logits
    mask: Tensor     # bool [B, T]

    @property
    def labels(self) -> Tensor:
        """As TRL masks: -100 is ignored."""
        return torch.where(self.mask, 0, -100)


def random_case(vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    source = torch.Generator().manual_seed(1000 * vocab + seed)
    student, teacher = (3 * torch.randn(*SHAPE, vocab, generator=source, dtype=dtype) for _ in range(2))
    mask = torch.rand(SHAPE, generator=source) < 0.7
    mask[0], mask[1, 0] = False, True  # an answer that does not count at all, and one that does
    return Case(student.requires_grad_(), teacher, mask)


def of_ours(case: Case, support: Support, beta: float, temperature: float = 1.0, ids: Tensor | None = None) -> Tensor:
    """[B, T] divergences; `ids` [B, T, K] are the teacher's evidence, -1 pads, or the whole vocabulary is."""
    vocab = case.student.shape[-1]
    logits_NV = case.student.view(-1, vocab) / temperature
    q_NV = (case.teacher.view(-1, vocab) / temperature).log_softmax(-1)
    sampled_N = torch.zeros(len(q_NV), dtype=torch.long)
    if ids is None:
        target = Target(sampled_N, q_NV)
    else:
        ids_NK = ids.view(len(q_NV), -1)
        target = Target(sampled_N, q_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, -torch.inf), ids_NK)
    return diverge(partition(logits_NV, target, support, ()), JSD(beta)).view(SHAPE)


def union_of_tops(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """[..., 2k] ids of both top-k, each once; -1 pads."""
    ids = torch.cat([teacher.topk(k).indices, student.detach().topk(k).indices], -1).sort(-1).values
    twice = torch.zeros_like(ids, dtype=torch.bool)
    twice[..., 1:] = ids[..., 1:] == ids[..., :-1]
    return ids.masked_fill(twice, -1)


def agree(
    ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor], tolerance: float = 1e-5, their_leaves: Sequence[Tensor] = ()
) -> None:
    """One value, and one gradient at each leaf; a disagreement names TRL's version."""
    import trl

    def close(mine: Tensor, other: Tensor, what: str) -> None:
        assert bool(mine.isfinite().all())
        torch.testing.assert_close(
            mine, other, atol=tolerance, rtol=tolerance, check_dtype=False, msg=lambda m: f"TRL {trl.__version__}: {what} differs.\n{m}"
        )

    close(ours, theirs, "the loss")
    gradients = torch.autograd.grad(ours, leaves, retain_graph=True)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, their_leaves or leaves, retain_graph=True), strict=True):
        close(mine, other, "a gradient")


def test_trl_is_the_version_that_pyproject_names() -> None:
    import trl

    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["trl"] == [f"trl=={trl.__version__}"]


# ---------------------------------------------------------------- the whole vocabulary
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_generalised_jsd_is_that_of_trl_s_gkd(vocab: int, beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    case = random_case(vocab)
    theirs = GKDTrainer.generalized_jsd_loss(case.student, case.teacher, case.labels, beta=beta, temperature=temperature)
    agree(of_ours(case, FullVocabulary(), beta, temperature)[case.mask].mean(), theirs, [case.student])


@pytest.mark.parametrize("beta", BETAS)
def test_each_of_gkd_s_reductions_is_a_sum_of_the_same_tokens(beta: float) -> None:
    """Its "batchmean" is a mean over tokens where there are labels, and over answers where there are none."""
    from trl.experimental.gkd import GKDTrainer

    case, theirs = random_case(64), GKDTrainer.generalized_jsd_loss
    each_BT = of_ours(case, FullVocabulary(), beta)
    counted = each_BT[case.mask]
    two = (case.student, case.teacher)
    agree(counted.sum(), theirs(*two, case.labels, beta=beta, reduction="sum"), [case.student])
    agree(counted.sum() / 100, theirs(*two, case.labels, beta=beta, num_items_in_batch=100), [case.student])
    agree(counted.mean() / 64, theirs(*two, case.labels, beta=beta, reduction="mean"), [case.student])
    agree(each_BT.sum() / SHAPE[0], theirs(*two, beta=beta), [case.student])
    torch.testing.assert_close(each_BT, theirs(*two, beta=beta, reduction="none").sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_from_hidden_states_it_is_that_of_trl_s_distillation_trainer(vocab: int, beta: float, temperature: float) -> None:
    """Its own backward, by tiles of the head, against autograd through our cells."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    source = torch.Generator().manual_seed(vocab)
    states, teacher_states = (torch.randn(*SHAPE, HIDDEN_SIZE, generator=source) for _ in range(2))
    head, teacher_head = (torch.randn(vocab, HIDDEN_SIZE, generator=source) for _ in range(2))
    leaves = [states.requires_grad_(), head.requires_grad_()]
    mask = random_case(vocab).mask
    case = Case(states @ head.T, teacher_states @ teacher_head.T, mask)
    theirs, _, counted = _chunked_divergence_loss(
        states, teacher_states, head, teacher_head, mask, beta, temperature=temperature
    )
    assert int(counted) == int(mask.sum())
    agree(of_ours(case, FullVocabulary(), beta, temperature)[mask].mean(), theirs, leaves)


# ---------------------------------------------------------------- supports
@pytest.mark.parametrize("remainder", ["tail", "renorm"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("vocab", "k"), [(7, 2), (64, 5), (1000, 16)])
def test_a_top_k_with_its_tail_is_trl_s(vocab: int, k: int, beta: float, temperature: float, remainder: Remainder) -> None:
    """The teacher's top k for forward KL, the student's for reverse, both for what lies between. In float64, since the tail of
    TRL is 1 minus a sum and ours a sum; and where it is below 1e-7, each is cut off at its own least."""
    from trl.experimental.iw_opd import IWOPDTrainer

    case = random_case(vocab, k, torch.float64)
    if beta in (0.0, 1.0):
        support = TeacherTop(k, remainder) if beta == 0 else StudentTop(k, remainder)
        each_BT = of_ours(case, support, beta, temperature)
    else:
        ids = union_of_tops(case.student, case.teacher, k)
        each_BT = of_ours(case, Union(k, k, sampled=False, stop=False, remainder=remainder), beta, temperature, ids)
    theirs = IWOPDTrainer.generalized_jsd_loss(
        case.student, case.teacher, case.labels, beta=beta, temperature=temperature, top_k=k, add_tail=remainder == "tail"
    )
    agree(each_BT[case.mask].mean(), theirs, [case.student], tolerance=1e-6 if remainder == "tail" else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("remainder", ["tail", "renorm"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("vocab", "k"), [(7, 2), (64, 5), (1000, 16)])
def test_the_student_s_top_k_is_that_of_trl_s_sdft(vocab: int, k: int, beta: float, remainder: Remainder, dtype: torch.dtype) -> None:
    """Ours in float32 too, against theirs in float64: in float32 the gradient of its tail is off by 2e-4 here, ours by 3e-6."""
    from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

    mine = random_case(vocab, k, dtype)
    exact = Case(mine.student.detach().double().requires_grad_(), mine.teacher.double(), mine.mask)
    theirs_BT = compute_topk_self_distillation_loss(
        exact.student, exact.teacher, distillation_topk=k, distillation_alpha=beta, distillation_add_tail=remainder == "tail"
    )
    each_BT = of_ours(mine, StudentTop(k, remainder), beta)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if remainder == "tail" else 1e-10
    agree(each_BT[mine.mask].mean(), theirs_BT[mine.mask].mean(), [mine.student], tolerance, [exact.student])


@pytest.mark.parametrize("remainder", ["tail", "renorm"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (64, 6), (1000, 16)])
def test_ragged_candidates_are_those_of_trl_s_asynchronous_trainer(vocab: int, k: int, beta: float, remainder: Remainder) -> None:
    """Its head runs in chunks that are computed again in the backward; candidates are padded with -1, as ours are."""
    from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

    source = torch.Generator().manual_seed(vocab)
    states = torch.randn(*SHAPE, HIDDEN_SIZE, generator=source, dtype=torch.float64).requires_grad_()
    head = torch.randn(vocab, HIDDEN_SIZE, generator=source, dtype=torch.float64).requires_grad_()
    case = random_case(vocab, dtype=torch.float64)._replace(student=states @ head.T)
    ids = case.teacher.topk(k).indices
    ids[torch.rand(ids.shape, generator=source) < 0.3] = -1
    ids[..., 0] = ids[..., 0].where(ids[..., 0] >= 0, case.teacher.argmax(-1))  # it leaves out tokens with no candidate at all
    ids_NK, valid_NK = ids[case.mask], ids[case.mask] >= 0
    logq_NK = case.teacher.log_softmax(-1)[case.mask].gather(1, ids_NK.clamp(min=0)).masked_fill(~valid_NK, -torch.inf)
    theirs, *_ = _chunked_jsd_loss(
        states[case.mask], head, None, 1.0, None, ids_NK, logq_NK, valid_NK, beta, 1.0, remainder == "tail", None, 1, chunk_size=4
    )
    support = Union(k, k, sampled=False, stop=False, remainder=remainder)
    agree(of_ours(case, support, beta, ids=ids)[case.mask].sum(), theirs, [states, head])


# ---------------------------------------------------------------- one token
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_gradient_at_the_written_token_is_that_of_trl_s_sdft(vocab: int) -> None:
    """Policy gradient of reverse KL. Its value says nothing, and both have the same."""
    from trl.experimental.sdft.loss_utils import compute_sampled_token_self_distillation_loss

    case = random_case(vocab)
    written_BT1 = torch.randint(vocab, (*SHAPE, 1), generator=torch.Generator().manual_seed(vocab))
    logp_BT, logq_BT = (
        logits.log_softmax(-1).gather(-1, written_BT1)[..., 0] for logits in (case.student, case.teacher)
    )
    mine_BT = -coefficient(logp_BT.detach(), logq_BT, ReverseKL()) * logp_BT
    theirs_BT = compute_sampled_token_self_distillation_loss(
        case.student, case.teacher, written_BT1[..., 0], distillation_alpha=1.0
    )
    agree(mine_BT[case.mask].mean(), theirs_BT[case.mask].mean(), [case.student])
