"""Gradients in closed form against autograd through the plain formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamopd.learn.head import speak
from streamopd.learn.objective.cells import Target, partition
from streamopd.learn.objective.divergence import Divergence, _distance, slope
from streamopd.slots import (
    JSD,
    ForwardKL,
    FullVocabulary,
    Loss,
    ReverseKL,
    SkewForward,
    SkewReverse,
    Support,
    TeacherTop,
    TotalVariation,
)

LOSSES: list[Loss] = [
    ReverseKL(), ForwardKL(), JSD(0.0), JSD(0.1), JSD(0.5), JSD(1.0), SkewForward(0.0), SkewForward(0.1), SkewReverse(0.0),
    SkewReverse(0.1), TotalVariation(),
]


def log_masses(rows: int, vocab: int) -> Tensor:
    return (3 * torch.randn(rows, vocab, dtype=torch.float64)).log_softmax(1)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_slope_of_a_divergence_is_autograd_s(loss: Loss) -> None:
    torch.manual_seed(0)
    p, q = log_masses(5, 11).requires_grad_(), log_masses(5, 11)
    expected = torch.autograd.grad(_distance(p, q, loss).sum(), p)[0]
    torch.testing.assert_close(slope(p.detach(), q, loss), expected)
    weight = torch.rand(5, dtype=torch.float64)
    told = torch.autograd.grad((Divergence.apply(p, q, loss) * weight).sum(), p)[0]
    torch.testing.assert_close(told, expected * weight[:, None])


@pytest.mark.parametrize("stop_ids", [(), (3,), (3, 7), (9, 0, 4)])
@pytest.mark.parametrize("support", [FullVocabulary(), TeacherTop(3), TeacherTop(3, "renorm"), TeacherTop(3, "drop")], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_gradient_reaches_the_logits_as_finite_differences_say(loss: Loss, support: Support, stop_ids: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    q = log_masses(4, 11)
    stop_logmass = q[:, list(stop_ids)].logsumexp(1) if stop_ids else None
    target = Target(torch.zeros(4, dtype=torch.long), q, stop_logmass=stop_logmass)

    def told(logits: Tensor) -> Tensor:
        cells = partition(logits, target, support, stop_ids)
        return Divergence.apply(cells.p, cells.q, loss)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(told, (log_masses(4, 11).requires_grad_(),))


def test_a_head_that_adds_in_place_has_the_gradient_of_a_plain_one() -> None:
    torch.manual_seed(2)
    head, hidden = nn.Linear(4, 9, bias=False), torch.randn(7, 4).requires_grad_()
    for _ in range(2):
        head(hidden).square().sum().backward()
    assert head.weight.grad is not None
    assert hidden.grad is not None
    expected = head.weight.grad.clone(), hidden.grad.clone()
    head.weight.grad = hidden.grad = None
    for _ in range(2):
        speak(head, hidden).square().sum().backward()
    torch.testing.assert_close((head.weight.grad, hidden.grad), expected)
