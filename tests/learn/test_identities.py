"""The identities of core.md 0.2 (I1 to I12) and what is left of the numbers of 0.1, against float64 brute force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamopd.learn.objective import Observed, Target, instruct
from streamopd.learn.objective.divergence import coefficient
from streamopd.learn.objective.pool import pooled
from streamopd.slots import (
    JSD,
    Baseline,
    Branch,
    Clip,
    ClippedRatio,
    Correction,
    Extrapolate,
    ForwardKL,
    HardGate,
    Loss,
    NoCorrection,
    Pool,
    ReverseKL,
    SecondMomentBudget,
    SkewForward,
    SkewReverse,
    TeacherEntropy,
    TeacherRatio,
    TeacherTop,
    TotalVariation,
    TruncatedRatio,
    Union,
    VocabularySlice,
)

from .positions import (
    FORWARD,
    HALF_JSD,
    REVERSE,
    B,
    D,
    Floats,
    P,
    Q,
    composed,
    distributions,
    exact,
    facts_of,
    gradient_of,
    kl,
    known_about,
    look_at,
    orders_of,
    slope,
    softmax,
    spoken,
    told,
    whole,
)

DIRECT: list[Loss] = [
    ReverseKL(), ForwardKL(), JSD(0.5), JSD(0.1), JSD(0.9), JSD(0.0), JSD(1.0), SkewForward(0.1), SkewForward(0.7), SkewReverse(0.1),
    SkewReverse(0.7), TotalVariation(),
]
VANILLA = composed(gradient_of(ReverseKL()))


def brute(loss: Loss, p: Floats, q: Floats) -> float:
    """The divergence from its definition."""
    if isinstance(loss, ReverseKL):
        return kl(p, q)
    if isinstance(loss, ForwardKL):
        return kl(q, p)
    if isinstance(loss, SkewForward):
        return kl(q, loss.alpha * q + (1 - loss.alpha) * p)
    if isinstance(loss, SkewReverse):
        return kl(p, (1 - loss.alpha) * q + loss.alpha * p)
    if isinstance(loss, TotalVariation):
        return float(abs(p - q).sum() / 2)
    assert isinstance(loss, JSD)
    m = loss.beta * q + (1 - loss.beta) * p
    return {0.0: kl(q, p), 1.0: kl(p, q)}.get(loss.beta, loss.beta * kl(q, m) + (1 - loss.beta) * kl(p, m))


# ---------------------------------------------------------------- 0.1
def test_the_log_ratio_is_positive_where_the_teacher_likes_the_token_more() -> None:
    found = coefficient(torch.tensor(np.log(P)), torch.tensor(np.log(Q)), ReverseKL())
    np.testing.assert_allclose(found, (-1.09861, 0.51083, 1.09861), atol=1e-5)


def test_the_teachers_entropy_is_that_of_its_whole_distribution() -> None:
    method = composed(exact(ReverseKL(), when=TeacherEntropy()))
    found = Observed(look_at(torch.tensor(np.log(P))[None], whole(Q, [0])), method)["teacher_entropy"]
    assert float(found) == pytest.approx(1.02965, abs=1e-5)


# ---------------------------------------------------------------- I1
@given(distributions())
def test_the_mean_log_ratio_under_the_student_is_minus_reverse_kl(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    told_V = coefficient(torch.tensor(np.log(p)), torch.tensor(np.log(q)), ReverseKL()).numpy()
    assert p @ told_V == pytest.approx(-kl(p, q), abs=1e-9)


@given(distributions())
def test_the_baseline_makes_the_mean_coefficient_zero(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    order_V = orders_of(composed(gradient_of(ReverseKL(), shape=(Baseline(k=0),))), p, q)[0]
    assert p @ order_V == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- I2
def test_policy_gradient_of_the_log_ratio_is_the_exact_reverse_kl_gradient() -> None:
    np.testing.assert_allclose(spoken(VANILLA).mean(P), REVERSE, atol=1e-5)


def test_a_constant_on_the_coefficient_leaves_the_expected_gradient() -> None:
    with_constant = composed(gradient_of(ReverseKL(), shape=(Baseline(k=0),)))
    np.testing.assert_allclose(spoken(with_constant).mean(P), REVERSE, atol=1e-5)


def test_half_the_squared_log_ratio_back_propagated_has_the_gradient_of_the_log_ratios_policy_gradient() -> None:
    found = spoken(VANILLA).gradient
    for y in range(3):  # k2, token by token: so its expectation is reverse KL's too
        np.testing.assert_allclose(found[y], slope(lambda p, y=y: 0.5 * (np.log(Q[y]) - np.log(p[y])) ** 2, P), atol=1e-8)


# ---------------------------------------------------------------- I3, I4
def test_the_estimator_k1_back_propagated_would_teach_nothing_and_no_direct_loss_is_it() -> None:
    k1 = [slope(lambda p, y=y: np.log(p[y]) - np.log(Q[y]), P) for y in range(3)]
    np.testing.assert_allclose(P @ np.stack(k1), 0, atol=1e-8)
    direct = spoken(composed(exact(ReverseKL()))).gradient
    np.testing.assert_allclose(direct, [REVERSE] * 3, atol=1e-5)  # whichever token was written


@pytest.mark.parametrize("form", ["direct", "stop_gradient", "per_candidate"])
def test_a_loss_over_candidates_says_the_same_whichever_token_was_written(form: str) -> None:
    found = spoken(composed(Branch(loss=ReverseKL(), form=form, support=VocabularySlice((0, 1)))))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.gradient, found.gradient[:1].repeat(3, 0))


def test_what_k3_back_propagated_would_teach_has_the_name_of_forward_kl() -> None:
    k3 = [slope(lambda p, y=y: Q[y] / p[y] - 1 - np.log(Q[y] / p[y]), P) for y in range(3)]
    np.testing.assert_allclose(P @ np.stack(k3), FORWARD, atol=1e-7)
    np.testing.assert_allclose(spoken(composed(gradient_of(ForwardKL()))).mean(P), FORWARD, atol=1e-7)


# ---------------------------------------------------------------- I5
@pytest.mark.parametrize(("loss", "gradient"), [(ReverseKL(), REVERSE), (ForwardKL(), FORWARD), (JSD(0.5), HALF_JSD)])
def test_policy_gradients_have_the_published_gradients_of_their_divergences(loss: Loss, gradient: Sequence[float]) -> None:
    np.testing.assert_allclose(spoken(composed(gradient_of(loss))).mean(P), gradient, atol=1e-5)


@pytest.mark.parametrize(("loss", "published"), [
    (ReverseKL(), lambda u: np.log(u) - 1), (ForwardKL(), lambda u: u), (JSD(0.5), lambda u: 0.5 * np.log((1 + u) / 2)),
])
def test_coefficients_are_the_published_ones_up_to_a_constant(loss: Loss, published: object) -> None:
    found = coefficient(torch.tensor(np.log(P)), torch.tensor(np.log(Q)), loss).numpy() - published(Q / P)  # type: ignore[operator]
    np.testing.assert_allclose(found, found[0], atol=1e-12)


@settings(max_examples=40)
@given(distributions(), st.sampled_from(DIRECT))
def test_a_policy_gradient_expects_the_gradient_of_its_divergence(drawn: list[Floats], loss: Loss) -> None:
    p, q, _ = drawn
    found = spoken(composed(gradient_of(loss)), p, q).mean(p)
    np.testing.assert_allclose(found, slope(lambda x: brute(loss, x, q), p), atol=1e-6)


@settings(max_examples=40)
@given(distributions(), st.sampled_from(DIRECT))
def test_a_direct_loss_has_value_and_gradient_of_its_definition(drawn: list[Floats], loss: Loss) -> None:
    p, q, _ = drawn
    found = spoken(composed(exact(loss)), p, q)
    np.testing.assert_allclose(found.loss, brute(loss, p, q), atol=1e-10)
    np.testing.assert_allclose(found.gradient[0], slope(lambda x: brute(loss, x, q), p), atol=1e-6)


@given(distributions(), st.sampled_from(DIRECT))
def test_a_student_that_is_its_teacher_has_coefficients_of_exactly_zero(drawn: list[Floats], loss: Loss) -> None:
    logp = torch.tensor(np.log(drawn[0]))
    assert (coefficient(logp, logp.clone(), loss).abs() < 1e-15).all()


# ---------------------------------------------------------------- I7
Q2, SHARES = np.array([0.5, 0.2, 0.3]), (0.7, 0.3)


def test_the_geometric_pool_of_two_teachers_is_the_published_one() -> None:
    pool = pooled([whole(Q, [0]), whole(Q2, [0])], SHARES, "geometric", ())
    np.testing.assert_allclose(pool.support[0].exp(), (0.27916, 0.40274, 0.31810), atol=1e-5)


def test_weighted_reverse_kl_is_reverse_kl_to_the_geometric_pool_less_log_z() -> None:
    z = (Q**0.7 * Q2**0.3).sum()
    to_pool = float(told(torch.tensor(np.log(P))[None], pooled([whole(Q, [0]), whole(Q2, [0])], SHARES, "geometric", ()), EXACT).loss)
    assert 0.7 * kl(P, Q) + 0.3 * kl(P, Q2) == pytest.approx(0.313592, abs=1e-6)
    assert to_pool - np.log(z) == pytest.approx(0.313592, abs=1e-6)


EXACT = composed(exact(ReverseKL()))


@given(distributions(), st.floats(0.05, 0.95), st.booleans())
def test_the_pools_gradient_is_the_weighted_gradients(drawn: list[Floats], share: float, arithmetic: bool) -> None:
    p, q, q2 = drawn
    kind, loss = ("arithmetic", ForwardKL()) if arithmetic else ("geometric", ReverseKL())
    logits = torch.tensor(np.log(p))[None].requires_grad_()
    pool = pooled([whole(q, [0]), whole(q2, [0])], (share, 1 - share), kind, ())  # type: ignore[arg-type]
    told(logits, pool, composed(exact(loss))).loss.sum().backward()
    apart = slope(lambda x: share * brute(loss, x, q) + (1 - share) * brute(loss, x, q2), p)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy()[0], apart, atol=1e-6)


class Crowd(NamedTuple):
    """Teachers of a few positions over one vocabulary, each with ids of its own."""

    p: Floats                    # [N, V]
    q: Floats                    # [J, N, V]
    ids: list[list[list[int]]]   # [J][N]
    shares: Floats               # [J]
    stop_ids: list[int]
    written: list[int]           # [N]


@st.composite
def crowds(draw: st.DrawFn) -> Crowd:
    vocab, teachers, rows = draw(st.integers(4, 9)), draw(st.integers(2, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stop_ids = draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=2))
    p, *q = (np.stack([softmax(rng.normal(size=vocab) * 2) for _ in range(rows)]) for _ in range(teachers + 1))
    written = rng.integers(0, vocab, rows).tolist()
    few = st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab - 1)
    ids = [[draw(st.permutations(sorted({*draw(few), *stop_ids, written[row]}))) for row in range(rows)] for _ in range(teachers)]
    return Crowd(p, np.stack(q), ids, rng.uniform(0.2, 2.0, teachers), stop_ids, written)


def views_of(crowd: Crowd) -> list[Target]:
    return [_view(q_NV, ids, crowd) for q_NV, ids in zip(crowd.q, crowd.ids, strict=True)]


def _view(q_NV: Floats, ids: list[list[int]], crowd: Crowd) -> Target:
    width = max(map(len, ids))
    padded = np.array([row + [-1] * (width - len(row)) for row in ids]).reshape(len(ids), width)
    support = np.where(padded >= 0, np.log(np.take_along_axis(q_NV, np.maximum(padded, 0), 1)), -np.inf)
    stop = torch.tensor(np.log(q_NV[:, crowd.stop_ids].sum(1))) if crowd.stop_ids else None
    return Target(
        torch.tensor(crowd.written), torch.tensor(support), torch.tensor(padded), torch.tensor(np.exp(support).sum(1)), stop,
        torch.tensor(np.log(q_NV[np.arange(len(ids)), crowd.written])),
    )


def common_cells(crowd: Crowd, row: int) -> tuple[list[list[int]], list[int]]:
    """The ids that all teachers told of, one by one, the stop ids together where there are several; and what is left."""
    stops = crowd.stop_ids if len(crowd.stop_ids) > 1 else []
    common = set.intersection(*(set(of_teacher[row]) for of_teacher in crowd.ids)) - set(stops)
    cells = [[i] for i in sorted(common)] + ([stops] if stops else [])
    return cells, sorted(set(range(crowd.q.shape[2])) - set().union(*cells))


def masses(distribution: Floats, cells: Sequence[Sequence[int]]) -> Floats:
    return np.array([distribution[list(cell)].sum() for cell in cells])


def pool_of(crowd: Crowd, row: int, cells: Sequence[Sequence[int]], kind: str) -> tuple[Floats, float]:
    """(the pool over the cells, its normaliser)."""
    w = crowd.shares / crowd.shares.sum()
    each = np.stack([masses(q[row], cells) for q in crowd.q])
    together = np.exp(w @ np.log(each)) if kind == "geometric" else w @ each
    return together / together.sum(), float(together.sum())


@settings(max_examples=80)
@given(crowds(), st.sampled_from(["geometric", "arithmetic"]))
def test_a_pool_of_ragged_supports_is_the_pool_of_the_cells_that_all_speak_of(crowd: Crowd, kind: str) -> None:
    pool = pooled(views_of(crowd), crowd.shares.tolist(), kind, crowd.stop_ids)  # type: ignore[arg-type]
    assert pool.ids is not None
    assert pool.logp is not None
    assert pool.mass is not None
    for row, written in enumerate(crowd.written):
        cells, rest = common_cells(crowd, row)
        together, z = pool_of(crowd, row, cells + ([rest] if rest else []), kind)
        by_id = {cell[0]: mass for cell, mass in zip(cells, together, strict=False) if cell is not crowd.stop_ids and len(cell) == 1}
        found = {int(i): float(x.exp()) for i, x in zip(pool.ids[row], pool.support[row], strict=True) if i >= 0}
        assert found == pytest.approx(by_id, abs=1e-6)
        assert float(pool.mass[row]) == pytest.approx(sum(by_id.values()), abs=1e-6)
        if len(crowd.stop_ids) > 1:
            assert pool.stop_logmass is not None
            assert float(pool.stop_logmass[row].exp()) == pytest.approx(together[len(cells) - 1], abs=1e-6)
        w = crowd.shares / crowd.shares.sum()
        of_written = crowd.q[:, row, written]
        mean = np.exp(w @ np.log(of_written)) / z if kind == "geometric" else w @ of_written
        assert float(pool.logp[row].exp()) == pytest.approx(mean, abs=1e-6)


@settings(max_examples=60)
@given(crowds(), st.booleans())
def test_the_identity_of_pools_holds_for_the_bounds_of_ragged_supports_too(crowd: Crowd, arithmetic: bool) -> None:
    kind, loss = ("arithmetic", ForwardKL()) if arithmetic else ("geometric", ReverseKL())
    pool = pooled(views_of(crowd), crowd.shares.tolist(), kind, crowd.stop_ids)  # type: ignore[arg-type]
    found = told(torch.tensor(np.log(crowd.p)), pool, composed(Branch(loss=loss)), crowd.stop_ids).loss
    w = crowd.shares / crowd.shares.sum()
    for row in range(len(crowd.written)):
        cells, rest = common_cells(crowd, row)
        cells = cells + ([rest] if rest else [])
        p = masses(crowd.p[row], cells)
        apart = sum(share * brute(loss, p, masses(q[row], cells)) for share, q in zip(w, crowd.q, strict=True))
        together, z = pool_of(crowd, row, cells, kind)
        less = np.log(z) if kind == "geometric" else kl_of_mixture(w, crowd, row, cells, together)
        assert float(found[row]) - less == pytest.approx(apart, abs=1e-5)


def kl_of_mixture(w: Floats, crowd: Crowd, row: int, cells: Sequence[Sequence[int]], together: Floats) -> float:
    """Minus Σ w KL(q_k ‖ pool): what forward KL to the arithmetic pool lacks, and no student can change."""
    return -sum(float(share) * kl(masses(q[row], cells), together) for share, q in zip(w, crowd.q, strict=True))


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_a_pool_of_one_is_its_only_teacher(kind: str) -> None:
    view = whole(Q, [0])
    assert pooled([view], (0.3,), kind, ()) is view  # type: ignore[arg-type]


def test_pool_weights_are_shares_whatever_they_sum_to() -> None:
    assert Pool().weights == ()
    small, large = (pooled([whole(Q, [0]), whole(Q2, [0])], [k * 0.7, k * 0.3], "geometric", ()).support for k in (1, 100))
    torch.testing.assert_close(small, large, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- I8
MU = np.array([0.5, 0.3, 0.2])


def test_a_stale_sample_corrected_by_its_ratio_gives_the_exact_gradient() -> None:
    found = spoken(composed(gradient_of(ReverseKL()), correction=TruncatedRatio(cap=1e9)), mu=MU).mean(MU)
    np.testing.assert_allclose(found, REVERSE, atol=1e-5)


def test_a_stale_sample_without_correction_gives_the_published_other_gradient() -> None:
    found = spoken(composed(gradient_of(ReverseKL()), correction=NoCorrection()), mu=MU).mean(MU)
    np.testing.assert_allclose(found, (0.44350, -0.20615, -0.23736), atol=1e-5)


def test_the_advantage_frozen_at_generation_would_give_another_gradient_and_is_not_what_is_computed() -> None:
    frozen = P * (np.log(Q) - np.log(MU))  # rho · (log q − log mu) · mu
    published = -(frozen - P * frozen.sum())
    np.testing.assert_allclose(published, (0.33619, -0.26004, -0.07614), atol=1e-5)
    found = spoken(composed(gradient_of(ReverseKL()), correction=TruncatedRatio(cap=1e9)), mu=MU).mean(MU)
    assert abs(found - published).max() > 0.05


@settings(max_examples=40)
@given(distributions(), st.sampled_from(DIRECT))
def test_any_stale_kernel_is_corrected_exactly_for_any_divergence(drawn: list[Floats], loss: Loss) -> None:
    p, q, mu = drawn
    found = spoken(composed(gradient_of(loss), correction=TruncatedRatio(cap=1e9)), p, q, mu=mu).mean(mu)
    np.testing.assert_allclose(found, slope(lambda x: brute(loss, x, q), p), atol=1e-6)


# ---------------------------------------------------------------- I9
BEYOND = np.array([0.16346, 0.51385, 0.32269])


def test_the_extrapolated_target_is_the_published_stationary_point() -> None:
    p_star = B**-0.25 * Q**1.25 / (B**-0.25 * Q**1.25).sum()
    np.testing.assert_allclose(p_star, BEYOND, atol=1e-5)
    for branch in (gradient_of(ReverseKL(), target=Extrapolate(1.25)), exact(ReverseKL(), target=Extrapolate(1.25))):
        np.testing.assert_allclose(spoken(composed(branch), p_star, Q, b=B).mean(p_star), 0, atol=1e-9)
        assert abs(spoken(composed(branch), Q, Q, b=B).mean(Q)).max() > 1e-3


def test_the_advantage_is_the_same_for_every_token_at_the_stationary_point() -> None:
    p_star = B**-0.25 * Q**1.25 / (B**-0.25 * Q**1.25).sum()
    order_V = orders_of(composed(gradient_of(ReverseKL(), target=Extrapolate(1.25))), p_star, Q, b=B)[0]
    np.testing.assert_allclose(order_V, order_V[0], atol=1e-9)


# ---------------------------------------------------------------- I10
ENDS = (1, 2)
STUDENT, TEACHER = np.array([0.3, 0.7, 1e-11]), np.array([0.3, 1e-11, 0.7])
STUDENT, TEACHER = STUDENT / STUDENT.sum(), TEACHER / TEACHER.sum()


def test_ending_by_another_id_is_no_log_ratio() -> None:
    apart, together = (orders_of(VANILLA, STUDENT, TEACHER, stop_ids=ends)[0] for ends in ((), ENDS))
    assert apart[1] == pytest.approx(-24.97, abs=0.01)
    np.testing.assert_allclose(together, 0, atol=1e-9)


@settings(max_examples=40)
@given(distributions(), st.sampled_from(DIRECT))
def test_with_the_stop_ids_merged_a_policy_gradient_expects_the_merged_divergences_gradient(drawn: list[Floats], loss: Loss) -> None:
    p, q = (np.append(x * (1 - sum(ends)), ends) for x, ends in zip(drawn, ((0.15, 0.05), (0.02, 0.4)), strict=False))
    stops = (len(p) - 2, len(p) - 1)

    def merged(x: Floats) -> float:
        return brute(loss, np.append(x[: stops[0]], x[list(stops)].sum()), np.append(q[: stops[0]], q[list(stops)].sum()))

    np.testing.assert_allclose(spoken(composed(gradient_of(loss)), p, q, stop_ids=stops).mean(p), slope(merged, p), atol=1e-6)


# ---------------------------------------------------------------- I11
@given(distributions(), st.data())
def test_a_stale_support_with_a_tail_costs_tightness_and_not_correctness(drawn: list[Floats], data: st.DataObject) -> None:
    p, q, _ = drawn
    ids = data.draw(st.lists(st.integers(0, len(p) - 1), unique=True, min_size=1))
    bound = partial(p, q, ids, "tail")
    assert float(bound.loss) <= kl(p, q) + 1e-7
    np.testing.assert_allclose(partial(q, q, ids, "tail").gradient, 0, atol=1e-7)  # its optimum is the teacher's


class Partial(NamedTuple):
    loss: float
    gradient: Floats


def partial(p: Floats, q: Floats, ids: Sequence[int], remainder: str, loss: Loss | None = None) -> Partial:
    """Over a support of `ids`, whoever chose them."""
    logits = torch.tensor(np.log(p))[None].requires_grad_()
    target = Target(torch.tensor([ids[0]]), torch.tensor(np.log(q[list(ids)]))[None], torch.tensor([list(ids)]))
    found = told(logits, target, composed(Branch(support=Union(remainder=remainder), loss=loss or ReverseKL()))).loss  # type: ignore[arg-type]
    found.sum().backward()
    assert logits.grad is not None
    return Partial(float(found.detach()), logits.grad.numpy()[0])


def test_a_truncated_support_moves_the_optimum_away_from_the_teacher() -> None:
    assert abs(partial(Q, Q, (0, 1), "drop").gradient).max() > 0.1
    assert partial(P, Q, (0, 1), "drop").loss > kl(P, Q)  # and is no bound


def test_a_renormalised_support_is_content_with_students_that_are_not_the_teacher() -> None:
    other = np.array([0.2, 0.5, 2.1]) / 2.8  # the teacher's shares within {0, 1}, and most mass outside
    np.testing.assert_allclose(partial(other, Q, (0, 1), "renorm").gradient, 0, atol=1e-9)
    assert abs(partial(other, Q, (0, 1), "tail").gradient).max() > 0.1


# ---------------------------------------------------------------- I12
CORRECTIONS: list[Correction] = [
    TruncatedRatio(), HardGate(), ClippedRatio(), SecondMomentBudget(budget=1e-9), TeacherRatio(),
]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("form", ["direct", "stop_gradient", "per_candidate"])
def test_losses_over_candidates_are_never_multiplied_by_the_ratio(correction: Correction, form: str) -> None:
    branch = Branch(loss=ReverseKL(), form=form, support=TeacherTop(2, remainder="drop"))  # type: ignore[arg-type]
    stale = orders_of(composed(branch, correction=correction), logmu=np.log([0.01, 0.01, 0.98]))
    np.testing.assert_array_equal(stale, 1)


def test_a_policy_gradient_is_multiplied_by_the_ratio() -> None:
    found = orders_of(composed(gradient_of(ReverseKL()), correction=TruncatedRatio(cap=1e9)), logmu=np.log(MU))[0]
    np.testing.assert_allclose(found, D * P / MU, rtol=1e-6)


@given(distributions(), st.sampled_from(CORRECTIONS), st.integers(0, 2**32 - 1))
def test_no_correction_turns_a_coefficient_around(drawn: list[Floats], correction: Correction, seed: int) -> None:
    p, q, mu = drawn
    rewards = np.random.default_rng(seed).normal(size=len(p))
    plain, corrected = (
        orders_of(composed(gradient_of(ReverseKL(), shape=(Clip(5.0),)), correction=c), p, q, logmu=np.log(mu), advantage=rewards)[0]
        for c in (NoCorrection(), correction)
    )
    assert (plain * corrected >= 0).all()


def test_what_a_teacher_wrote_is_not_corrected() -> None:
    method = composed(gradient_of(ReverseKL()), correction=HardGate())
    facts = facts_of(logp=[-1, -1], logq=[-2, -2], log_ratio=[3, 3])
    orders = instruct(facts, known_about(torch.tensor([0, 0]), author=[0, 1]), method)
    assert orders.tolist() == [[0, -1]]
