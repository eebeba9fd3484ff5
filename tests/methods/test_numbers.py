"""The numbers of a vocabulary of three, by hand: what each method makes of p = (.6, .3, .1) and q = (.2, .5, .3) there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamopd import methods
from streamopd.learn.objective import Known, Look, Target, Views, judge
from streamopd.slots import Method

P, Q, B = (torch.tensor(masses, dtype=torch.float64) for masses in ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), (0.4, 0.4, 0.2)))
REVERSE, FORWARD, JENSEN_SHANNON = (0.42153, -0.27207, -0.14947), (0.4, -0.2, -0.2), (0.09534, -0.05630, -0.03904)


def gradient(method: Method, p: Tensor = P, correct: float = 0.0, author: int = 0) -> tuple[float, Tensor]:
    """The loss expected under p, and its gradient in the logits: over every token that could have been written."""
    ids, every = torch.arange(3), torch.ones(3, dtype=torch.float64)
    known = Known(
        row=torch.zeros_like(ids), group=torch.zeros_like(ids), position=ids, segment=torch.zeros_like(ids), ids=ids,
        author=torch.full_like(ids, author), logmu=p.log(), temperature=every, correct=correct * every, pass_rate=0.5 * every,
        advantage=every, uniform=0.5 * every, weight=every,
    )
    teacher, reference = (view(masses, method.exact) for masses in (Q, B))
    logits = p.log().expand(3, 3).clone().requires_grad_()
    loss = (judge(Look(logits, Views(teacher, reference), known, ()), method).loss * p).sum()
    (loss + 0 * logits.sum()).backward()  # a method may tell these tokens nothing
    assert logits.grad is not None
    return float(loss.detach()), logits.grad.sum(0)


def view(masses: Tensor, whole: bool) -> Target:
    """A teacher that tells everything, as a whole vocabulary or as a support of all ids."""
    logp, ids = masses.log(), torch.arange(3)
    entropy = -(masses * logp).sum().expand(3)
    return Target(sampled=ids, support=logp.expand(3, 3), ids=None if whole else ids.expand(3, 3), logp=logp, entropy=entropy)


@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", methods.names())
def test_every_method_gives_a_finite_gradient_that_moves_no_mass_out_of_the_simplex(name: str, progress: float) -> None:
    for correct, author in ((0.0, 0), (1.0, 0), (1.0, 1)):
        loss, moved = gradient(methods.load(name).at(progress), correct=correct, author=author)
        assert loss == loss
        assert torch.isfinite(moved).all()
        assert abs(float(moved.sum())) < 1e-9


@pytest.mark.parametrize(
    ("name", "progress", "expected"),
    [
        *((name, 0.0, REVERSE) for name in (
            "opd", "default", "lsm", "rethinking", "many_faces", "vopd", "nemotron_cascade", "mimo_mopd", "deepseek_v4", "esr", "topd",
            "prefix_opd", "trb", "reopold", "scope", "uni_opd", "sod", "prefix_teach",
        )),
        *((name, 1.0, REVERSE) for name in ("qwen3",)),
        *((name, 0.0, FORWARD) for name in ("forward_kl", "forward_kl_topk", "speculative_kd", "adaswitch", "qwen3", "paced")),
        ("taid", 1.0, FORWARD), ("veto", 1.0, FORWARD),  # where their targets have become the teacher
        ("gkd", 0.0, JENSEN_SHANNON), ("opd_plus", 0.0, JENSEN_SHANNON),
    ],
)
def test_over_all_ids_a_method_has_the_gradient_of_its_divergence(name: str, progress: float, expected: tuple[float, ...]) -> None:
    _, moved = gradient(methods.load(name).at(progress))
    assert moved.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("veto", 0.189131), ("distillm", 0.305811), ("gkd", 0.091121), ("default", 0.396058)])
def test_a_direct_loss_has_the_value_of_its_card(name: str, expected: float) -> None:
    loss, _ = gradient(methods.load(name).at(0.0))
    assert loss == pytest.approx(expected, abs=2e-5)


def test_extrapolation_rests_beyond_the_teacher() -> None:
    rest = torch.tensor((0.16346, 0.51385, 0.32269), dtype=torch.float64)
    _, moved = gradient(methods.load("exopd").at(0.0), p=rest / rest.sum())
    assert moved.tolist() == pytest.approx((0, 0, 0), abs=1e-5)


def test_a_verifier_decides_which_half_of_the_signal_stays() -> None:
    told = {correct: gradient(methods.load("opdvr").at(0.0), correct=correct)[1] for correct in (0.0, 1.0)}
    assert (told[0.0] + told[1.0]).tolist() == pytest.approx(REVERSE, abs=1e-5)
    assert float(told[0.0][0]) > 0 > float(told[1.0][1])
