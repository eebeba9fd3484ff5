"""The "Test" of every card of core.md that is the objective's business, in the order of the cards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamopd import methods
from streamopd.learn.advantage import advantages
from streamopd.learn.objective import Facts, Known, Observed, Target, instruct
from streamopd.learn.objective.aim import aim, normalised
from streamopd.learn.objective.cells import Cells
from streamopd.learn.objective.correction import correct
from streamopd.learn.objective.divergence import coefficient, diverge, plackett_luce
from streamopd.learn.objective.route import holds
from streamopd.learn.objective.shape import bend
from streamopd.learn.objective.weight import downward_change, score, weigh
from streamopd.slots import (
    JSD,
    Advantage,
    AtLeastFloor,
    Baseline,
    Branch,
    ChangePoint,
    Cliff,
    Clip,
    ClippedRatio,
    Correct,
    Cosine,
    DropBeyond,
    Early,
    Entropy,
    EntropyOrDivergence,
    EntropyScore,
    Extrapolate,
    Floor,
    ForwardKL,
    FullVocabulary,
    GoldOrGuess,
    GroupSoftmax,
    HardGate,
    HighEntropy,
    Horizon,
    Incorrect,
    Interpolate,
    Intersection,
    Keep,
    Likelihood,
    Linear,
    Loss,
    MarginShift,
    Members,
    Method,
    Modulate,
    OffPolicyShape,
    OutcomeGate,
    PassRate,
    Power,
    ReferenceKL,
    RelativeConfidence,
    Return,
    ReverseKL,
    RockTokens,
    Shape,
    Sign,
    SkewForward,
    SkewReverse,
    SoftLog,
    Stage,
    StepRatio,
    StudentTop,
    Support,
    Teachability,
    TeacherAccepts,
    TeacherEntropy,
    TeacherPrefers,
    TeacherRatio,
    TeacherTop,
    TotalVariation,
    TruncatedRatio,
    Trusted,
    Union,
    Veto,
    VocabularySlice,
    Weight,
    WrittenBy,
    settled,
)

from .positions import (
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

VANILLA = composed(gradient_of(ReverseKL()))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(count: int, ids: Sequence[int] | None = None, **columns: object) -> Known:
    """`count` tokens of one answer, unless the columns say otherwise."""
    return known_about(torch.tensor(range(count) if ids is None else list(ids)), **columns)


def bent(shape: Shape, values: Sequence[float] | Floats, facts: Facts | None = None, **columns: object) -> Floats:
    return bend(column(*values), shape, facts or {}, tokens(len(values), **columns)).numpy()


def weighed(weight: Weight, facts: Facts, count: int, active: Sequence[bool] | None = None, **columns: object) -> Floats:
    spoken_to = torch.ones(count, dtype=torch.bool) if active is None else torch.tensor(active)
    return weigh(weight, facts, tokens(count, **columns), spoken_to).numpy()


def same_gradient(left: Method, right: Method, p: Floats = P, q: Floats = Q, **columns: object) -> None:
    np.testing.assert_allclose(spoken(left, p, q, **columns).gradient, spoken(right, p, q, **columns).gradient, atol=1e-12)


# ---------------------------------------------------------------- A1 MiniLLM
def test_a_return_without_discounted_future_is_the_tokens_own_log_ratio() -> None:
    same_gradient(composed(gradient_of(ReverseKL(), shape=(Return(gamma=0.0),))), VANILLA)


def test_the_decomposition_without_future_is_the_exact_reverse_kl_gradient() -> None:
    decomposed = composed(exact(ReverseKL()), gradient_of(ReverseKL(), shape=(Return(gamma=0.0, future=True),)))
    np.testing.assert_allclose(spoken(decomposed).gradient, [REVERSE] * 3, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_returns_sum_what_follows_in_the_same_answer(seed: int, gamma: float, normalised: bool, future: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 3)
    rows, a = np.repeat(np.arange(3), lengths), rng.normal(size=lengths.sum())
    expected = []
    for t in range(len(a)):
        ahead = [i for i in range(t + future, len(a)) if rows[i] == rows[t]]
        powers = np.array([gamma ** (i - t) for i in ahead])
        value, norm = powers @ a[ahead] if ahead else 0.0, powers.sum()
        expected.append(value / norm if normalised and norm > 0 else value)
    found = bent(Return(gamma, normalised, future), a, row=rows)
    np.testing.assert_allclose(found, expected, atol=1e-9)


# ---------------------------------------------------------------- A2 GKD
@given(distributions(spread=8.0), st.floats(0.01, 0.99))
def test_jensen_shannon_is_bounded_by_the_entropy_of_its_coin(drawn: list[Floats], beta: float) -> None:
    p, q, _ = drawn
    value = float(divergence(JSD(beta), p, q))
    assert -1e-9 <= value <= -beta * log(beta) - (1 - beta) * log(1 - beta) + 1e-9


@given(distributions(spread=8.0))
def test_half_jensen_shannon_is_symmetric_and_at_most_log_two(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    assert divergence(JSD(0.5), p, q) == pytest.approx(divergence(JSD(0.5), q, p), abs=1e-12)
    assert divergence(JSD(0.5), p, q) <= log(2) + 1e-12


def divergence(loss: Loss, p: Floats, q: Floats) -> float:
    return float(diverge(Cells(torch.tensor(np.log(p))[None], torch.tensor(np.log(q))[None]), loss))


# ---------------------------------------------------------------- A3 DistiLLM
def test_skewed_divergences_have_the_published_values() -> None:
    assert divergence(SkewForward(0.1), P, Q) == pytest.approx(0.292107, abs=1e-6)
    assert divergence(SkewReverse(0.1), P, Q) == pytest.approx(0.305811, abs=1e-6)


@given(distributions(spread=30.0), st.floats(0.001, 0.999))
def test_skewed_divergences_are_at_most_minus_log_alpha(drawn: list[Floats], alpha: float) -> None:
    p, q, _ = drawn
    assert -1e-9 <= divergence(SkewReverse(alpha), p, q) <= -log(alpha) + 1e-9
    assert -1e-9 <= divergence(SkewForward(alpha), p, q) <= -log(alpha) + 1e-9


def test_the_gradient_of_a_skewed_divergence_stays_bounded_where_that_of_forward_kl_explodes() -> None:
    p, q = np.array([1 - 1e-12, 1e-12]), np.array([1e-12, 1 - 1e-12])
    for loss in (SkewForward(0.1), SkewReverse(0.1), JSD(0.5)):
        assert abs(spoken(composed(exact(loss)), p, q).gradient).max() <= -log(0.1) + 1


@pytest.mark.parametrize("alpha", [0.0, 1e-9])
def test_without_skew_they_are_forward_and_reverse_kl(alpha: float) -> None:
    assert divergence(SkewForward(alpha), P, Q) == pytest.approx(kl(Q, P), abs=1e-6)
    assert divergence(SkewReverse(alpha), P, Q) == pytest.approx(kl(P, Q), abs=1e-6)


# ---------------------------------------------------------------- A4 DistiLLM-2
def test_the_contrastive_ramp_is_1_and_a_half_from_half_of_the_run_on() -> None:
    ramp = Linear(1.0, 1.5, until=0.5)
    assert [ramp.at(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([1, 1.25, 1.5, 1.5])


def test_teacher_text_counts_two_minus_the_ramp_and_student_text_the_ramp() -> None:
    method = methods.load("distillm2")
    scales = {progress: {b.when.author: b.scale for b in method.at(progress).branches} for progress in (0, 0.25, 0.5, 1)}  # type: ignore[union-attr]
    assert scales == {t: {"teacher": 2 - b, "student": b} for t, b in ((0, 1), (0.25, 1.25), (0.5, 1.5), (1, 1.5))}


# ---------------------------------------------------------------- A6 Thinking Machines
def test_at_the_sampling_weights_the_ratio_is_one_and_the_gradient_that_of_a_return_without_future() -> None:
    corrected = composed(gradient_of(ReverseKL()), correction=TruncatedRatio(cap=2.0))
    same_gradient(corrected, composed(gradient_of(ReverseKL(), shape=(Return(gamma=0.0),))))


def test_the_advantage_of_thinking_machines_is_scaled_and_never_normalised() -> None:
    np.testing.assert_allclose(orders_of(composed(gradient_of(ReverseKL(), scale=0.3)))[0], 0.3 * D, atol=1e-7)


# ---------------------------------------------------------------- B5 prefix only
def test_a_horizon_beyond_every_answer_is_vanilla() -> None:
    same_gradient(composed(gradient_of(ReverseKL(), when=Horizon(tokens=float("inf")))), VANILLA)


def test_a_horizon_speaks_to_the_first_tokens_of_each_answer() -> None:
    found = holds(Horizon(tokens=2), {}, tokens(5, position=[0, 1, 2, 0, 1]))
    assert found.tolist() == [True, True, False, True, True]


# ---------------------------------------------------------------- C1 Veto
def test_the_vetoed_target_is_the_published_product() -> None:
    target = Veto(beta=0.5)
    found = normalised(aim(column(*np.log(P))[None], column(*np.log(Q))[None], None, target), column(*np.log(Q))[None], target)
    np.testing.assert_allclose(found[0].exp(), (0.29585, 0.52299, 0.18117), atol=1e-5)


def test_forward_kl_to_the_vetoed_target_has_the_published_value_and_no_gradient_through_the_student_in_it() -> None:
    found = spoken(composed(exact(ForwardKL(), target=Veto(beta=0.5))))
    np.testing.assert_allclose(found.loss, 0.189131, atol=1e-6)
    aimed = Q * P**0.5 / (Q * P**0.5).sum()
    np.testing.assert_allclose(found.gradient[0], P - aimed, atol=1e-9)


def test_a_veto_that_has_faded_is_plain_distillation() -> None:
    for loss in (ForwardKL(), ReverseKL()):
        same_gradient(composed(exact(loss, target=Veto(beta=0.0))), composed(exact(loss)))
    assert [b.target.beta for b in methods.load("veto").at(1.0).branches] == [0.0]  # type: ignore[union-attr]


def test_a_veto_that_never_fades_ends_sharper_than_the_teacher() -> None:
    fixed = Q**2 / (Q**2).sum()
    np.testing.assert_allclose(fixed, (0.10526, 0.65789, 0.23684), atol=1e-5)
    np.testing.assert_allclose(spoken(composed(exact(ForwardKL(), target=Veto(beta=0.5))), fixed, Q).gradient, 0, atol=1e-9)


# ---------------------------------------------------------------- C2 TAID
def test_the_interpolated_target_is_the_published_one() -> None:
    found = spoken(composed(exact(ForwardKL(), target=Interpolate(t=0.4)))).gradient[0]
    np.testing.assert_allclose(P - found, (0.42495, 0.40448, 0.17056), atol=1e-5)  # forward KL's gradient is p − target


def test_interpolated_to_the_end_it_is_forward_kl_to_the_teacher() -> None:
    same_gradient(composed(exact(ForwardKL(), target=Interpolate(t=1.0))), composed(exact(ForwardKL())))


# ---------------------------------------------------------------- C3 EOPD
def test_no_entropy_is_above_infinity_and_then_it_is_vanilla() -> None:
    gate = exact(ForwardKL(), when=TeacherEntropy(above=float("inf")))
    same_gradient(composed(gradient_of(ReverseKL()), gate), VANILLA)


def test_above_the_threshold_forward_kl_is_added_and_the_policy_gradient_stays() -> None:
    both = spoken(composed(gradient_of(ReverseKL()), exact(ForwardKL(), when=TeacherEntropy(above=0.8)))).gradient
    np.testing.assert_allclose(both, spoken(VANILLA).gradient + (P - Q), atol=1e-9)  # H(q) = 1.02965


def test_the_added_forward_kl_is_of_raw_masses_on_the_teachers_top_ids() -> None:
    found = spoken(composed(Branch(loss=ForwardKL(), support=TeacherTop(2, remainder="drop"), when=TeacherEntropy(above=0.8)))).loss
    np.testing.assert_allclose(found, (Q * np.log(Q / P))[1:].sum())


# ---------------------------------------------------------------- C4 Revisiting OPD
@given(distributions())
def test_the_teachers_whole_vocabulary_renormalised_is_exact_reverse_kl(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    everything = composed(Branch(loss=ReverseKL(), support=TeacherTop(len(p), remainder="renorm")))
    same_gradient(everything, composed(exact(ReverseKL())), p, q)


# ---------------------------------------------------------------- C5 Rethinking OPD
def test_each_candidate_weighs_its_share_of_the_supports_mass() -> None:
    found = spoken(composed(Branch(loss=ReverseKL(), form="per_candidate", support=StudentTop(2, remainder="drop"))))
    w = P[:2] / P[:2].sum()
    expected = sum(w[v] * D[v] * (P - np.eye(3)[v]) for v in range(2))  # −w(v) sg[D(v)] ∇ log p(v)
    np.testing.assert_allclose(found.gradient, [expected] * 3, atol=1e-9)


@given(distributions(), st.sampled_from(["stop_gradient", "per_candidate"]))
def test_candidates_of_the_whole_vocabulary_give_the_exact_gradient(drawn: list[Floats], form: str) -> None:
    p, q, _ = drawn
    everything = composed(Branch(loss=ReverseKL(), form=form, support=StudentTop(len(p), remainder="drop")))  # type: ignore[arg-type]
    same_gradient(everything, composed(exact(ReverseKL())), p, q)


@given(distributions(), st.data())
def test_an_intersection_lies_in_both_top_ks(drawn: list[Floats], data: st.DataObject) -> None:
    p, q, _ = drawn
    k = data.draw(st.integers(1, len(p)))
    look = look_at(torch.tensor(np.log(p))[None], whole(q, [0]))
    kept = {support: masses(look.cells(support).q) for support in (Intersection(k, "drop"), StudentTop(k, "drop"), TeacherTop(k, "drop"))}
    both, students, teachers = (set(found.tolist()) for found in kept.values())
    assert both == students & teachers


def masses(logmass: torch.Tensor) -> torch.Tensor:
    """Those of cells that can occur."""
    return logmass[0][logmass[0] > -1e3]


# ---------------------------------------------------------------- C6 Many Faces
def test_the_stop_gradient_weight_form_has_the_published_gradient_and_sums_to_zero() -> None:
    found = spoken(composed(Branch(loss=ReverseKL(), form="stop_gradient", support=StudentTop(2, remainder="drop")))).gradient
    np.testing.assert_allclose(found, [(0.35562, -0.30502, -0.05059)] * 3, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-9)


# ---------------------------------------------------------------- C7 OPD+
def test_the_naive_coefficient_of_forward_kl_would_expect_another_gradient() -> None:
    naive = -(P * (-Q / P * D) - P * (P * (-Q / P * D)).sum())  # −f(u) = −u log u
    assert abs(naive - (P - Q)).max() > 0.1
    np.testing.assert_allclose(spoken(composed(gradient_of(ForwardKL()))).mean(P), P - Q, atol=1e-9)


# ---------------------------------------------------------------- C8 tail
@settings(max_examples=40)
@given(distributions(most=8), st.sampled_from([ReverseKL(), ForwardKL(), JSD(0.5)]), st.booleans())
def test_a_tail_bucket_never_loses_by_a_longer_support(drawn: list[Floats], loss: Loss, students: bool) -> None:
    p, q, _ = drawn
    top = StudentTop if students else TeacherTop
    values = [float(spoken(composed(Branch(loss=loss, support=top(k))), p, q).loss[0]) for k in range(1, len(p) + 1)]
    assert all(low <= high + 1e-7 for low, high in pairwise(values))
    assert values[-1] == pytest.approx(divergence(loss, p, q), abs=1e-6)
    assert values[-2] == pytest.approx(values[-1], abs=1e-6)  # one id left is no coarsening


# ---------------------------------------------------------------- C9 HPD
@given(distributions())
def test_gold_and_guess_are_told_by_the_published_rules(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    found = spoken(composed(Branch(loss=GoldOrGuess())), p, q).gradient
    guess = int(p.argmax())
    for y in range(len(p)):
        k1 = p[y] * np.log(q[y] / p[y])
        a1 = k1 + q[y] * (k1 > 0)
        a2 = min(p[guess] * np.log(q[guess] / p[guess]), 0.0) if guess != y else 0.0
        a1 += q[y] * (k1 > 0 and a2 < 0)
        expected = -a1 * (np.eye(len(p))[y] - p) - a2 * (np.eye(len(p))[guess] - p)
        np.testing.assert_allclose(found[y], expected, atol=1e-9)


def test_a_student_that_is_its_teacher_is_told_nothing_of_gold_or_guess() -> None:
    np.testing.assert_array_equal(spoken(composed(Branch(loss=GoldOrGuess())), P, P).gradient, 0)


# ---------------------------------------------------------------- C10 SelecTKD, PowerOPD, TV-OPD
@pytest.mark.parametrize(("q", "weight"), [((0.5, 0.2, 0.3), 1.0), ((0.3, 0.5, 0.2), 1.0), ((0.2, 0.5, 0.3), 0.01)])
def test_a_token_hardly_counts_where_the_teacher_would_not_take_the_students_first_choice(q: Sequence[float], weight: float) -> None:
    method = composed(exact(ReverseKL(), weight=(TeacherAccepts(k=2, otherwise=0.01),)))
    np.testing.assert_allclose(orders_of(method, P, np.array(q)), weight)


def test_a_first_choice_that_the_teacher_was_not_asked_about_is_not_accepted() -> None:
    """The evidence holds the teacher's three best of ten, the student prefers a fourth: with k = 5 nobody can know, and 3 < 5."""
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[0, 9] = 5
    target = Target(torch.tensor([0]), column(-1, -1.5, -2)[None], torch.tensor([[0, 1, 2]]))
    method = composed(Branch(weight=(TeacherAccepts(k=5, otherwise=0.01),)))
    look = look_at(logits, target)
    assert float(instruct(Observed(look, method), look.known, method)) == pytest.approx(0.01)


@pytest.mark.parametrize("form", ["direct", "policy_gradient"])
def test_as_many_of_the_teachers_ids_are_asked_for_as_acceptance_looks_at(form: str) -> None:
    branch = Branch(form=form, support=Union(student_k=2, teacher_k=2), weight=(TeacherAccepts(k=5),))  # type: ignore[arg-type]
    assert composed(branch).evidence.teacher_k >= 5


def test_bounded_powers_have_the_published_coefficients() -> None:
    np.testing.assert_allclose(orders_of(composed(gradient_of(Power(0.5))))[0], (-0.32738, 0.15938, 0.23149), atol=1e-5)


@given(distributions(spread=20.0), st.floats(0.01, 3))
def test_powers_lie_between_minus_one_and_one(drawn: list[Floats], exponent: float) -> None:
    p, q, _ = drawn
    found = coefficient(torch.tensor(np.log(p)), torch.tensor(np.log(q)), Power(exponent))
    assert (found.abs() <= 1).all()


def test_signs_share_one_scale_which_is_total_variation() -> None:
    found = orders_of(composed(gradient_of(ReverseKL(), shape=(Sign(),))))[0]
    np.testing.assert_allclose(np.sign(found), np.sign(D))
    np.testing.assert_allclose(abs(found), np.mean(np.minimum(abs(Q / P - 1) / 2, 1)))


def test_half_of_the_mean_distance_of_ratios_from_one_is_total_variation() -> None:
    drawn = np.repeat(np.arange(3), [6, 3, 1])  # ten tokens, in the student's own proportions
    found = bent(Sign(), D[drawn], facts_of(logp=np.log(P)[drawn], logq=np.log(Q)[drawn]))
    np.testing.assert_allclose(abs(found), divergence(TotalVariation(), P, Q))


# ---------------------------------------------------------------- D1 REOPOLD
@given(st.floats(0.01, 0.9), st.floats(-50, 50))
def test_the_floor_is_that_of_the_skewed_log_ratio(skew: float, told_D: float) -> None:
    lowest = log(skew + (1 - skew) * np.exp(-700.0)) / (1 - skew)
    assert bent(Floor(skew), [told_D])[0] == pytest.approx(max(told_D, lowest))


def test_a_floor_of_almost_no_skew_is_vanilla() -> None:
    same_gradient(composed(gradient_of(ReverseKL(), shape=(Floor(1e-300),))), VANILLA)


def test_exploring_keeps_the_tokens_at_or_above_the_floor() -> None:
    facts = facts_of(logp=[-1, -1, -1], logq=[-1, -3.0117, -3.0119])
    np.testing.assert_array_equal(weighed(AtLeastFloor(0.2, normaliser="none"), facts, 3), (1, 1, 0))


def test_refining_keeps_the_students_most_uncertain_tokens() -> None:
    facts = facts_of(entropy=[0.1, 0.9, 0.5, 0.7])
    np.testing.assert_array_equal(weighed(Keep(EntropyScore(), 0.5, normaliser="none"), facts, 4), (0, 1, 0, 1))


def test_the_kept_tokens_have_mean_one_over_all_that_the_branch_speaks_to() -> None:
    facts = facts_of(entropy=[0.1, 0.9, 0.5, 0.7, 9])
    found = weighed(Keep(EntropyScore(), 0.5), facts, 5, active=[True] * 4 + [False])
    np.testing.assert_allclose(found[:4], (0, 2, 0, 2))


def test_the_mask_changes_at_half_of_the_run() -> None:
    method = methods.load("reopold")
    kinds = {t: type(method.at(t).branches[0].weight[0]) for t in (0.0, 0.49, 0.5, 1.0)}
    assert kinds == {0.0: AtLeastFloor, 0.49: AtLeastFloor, 0.5: Keep, 1.0: Keep}


# ---------------------------------------------------------------- D2 vOPD
BASED = composed(gradient_of(ReverseKL(), shape=(Baseline(k=0),)))


@pytest.mark.parametrize("k", [0, 3, 100])
def test_the_baselined_advantages_are_the_published_ones(k: int) -> None:
    method = composed(gradient_of(ReverseKL(), shape=(Baseline(k=k),)))
    np.testing.assert_allclose(orders_of(method)[0], (-0.70255, 0.90688, 1.49467), atol=1e-5)


@given(distributions())
def test_a_baseline_keeps_the_expected_gradient(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    np.testing.assert_allclose(spoken(BASED, p, q).mean(p), spoken(VANILLA, p, q).mean(p), atol=1e-9)


@given(distributions(), st.floats(-5, 5))
def test_no_constant_makes_the_coefficients_smaller_than_the_baseline_does(drawn: list[Floats], constant: float) -> None:
    p, q, _ = drawn  # of the coefficients: that of the gradient may grow, at p and q of 0.1 it does
    assert p @ orders_of(BASED, p, q)[0] ** 2 <= p @ (np.log(q / p) + constant) ** 2 + 1e-9


def test_a_truncated_baseline_renormalises_both_sides() -> None:
    found = orders_of(composed(gradient_of(ReverseKL(), shape=(Baseline(k=2),))))[0] - D
    np.testing.assert_allclose(found, kl(P[:2] / P[:2].sum(), Q[:2] / Q[:2].sum()), atol=1e-9)  # .310819


# ---------------------------------------------------------------- D3 Stable-OPD
def test_without_golden_answers_and_leash_it_is_vanilla() -> None:
    leash = exact(ReferenceKL(), scale=0.0)
    off = composed(gradient_of(ReverseKL()), Branch(when=WrittenBy("gold"), loss=Likelihood(), scale=0.0), leash, behaviour=Members("gold"))
    np.testing.assert_allclose(spoken(off, b=B).gradient, spoken(VANILLA).gradient, atol=1e-12)


def test_a_golden_answer_is_imitated_and_no_reward_and_the_students_own_text_a_reward_alone() -> None:
    facts = facts_of(logp=[log(0.3)] * 2, logq=[log(0.6)] * 2, log_ratio=[0.0, 0.0])
    rewards, imitation, _ = instruct(facts, tokens(2, author=[0, 2]), methods.load("stable_opd").at(0.0))
    np.testing.assert_allclose(rewards, (log(2), 0), atol=1e-6)
    np.testing.assert_allclose(imitation, (0, 0.1), atol=1e-6)


def test_the_leash_is_reverse_kl_to_the_reference() -> None:
    found = spoken(composed(exact(ReferenceKL())), b=B)
    np.testing.assert_allclose(found.loss, kl(P, B))
    np.testing.assert_allclose(found.gradient[0], slope(lambda p: kl(p, B), P), atol=1e-7)


# ---------------------------------------------------------------- D4 AOPD
def aopd(margin: float) -> Method:
    return composed(gradient_of(ReverseKL(), when=TeacherPrefers(margin)), exact(ForwardKL()), routing="exclusive")


def test_what_the_teacher_prefers_is_reinforced_and_the_rest_imitated() -> None:
    reinforced, imitated = orders_of(aopd(0.0))
    np.testing.assert_allclose(reinforced, (0, D[1], D[2]), atol=1e-9)
    np.testing.assert_array_equal(imitated, (1, 0, 0))


def test_margins_at_the_ends_are_distillation_everywhere_and_imitation_everywhere() -> None:
    same_gradient(aopd(-1.0), VANILLA)
    same_gradient(aopd(1.0), composed(exact(ForwardKL())))


# ---------------------------------------------------------------- D5 TrOPD
def test_trust_is_the_published_chance() -> None:
    coins = (np.arange(30_000) + 0.5) / 30_000
    facts = facts_of(logp=np.log(P).repeat(len(coins)), logq=np.log(Q).repeat(len(coins)))
    shares = holds(Trusted(), facts, tokens(3 * len(coins), uniform=np.tile(coins, 3))).numpy().reshape(3, -1).mean(1)
    np.testing.assert_allclose(shares, (1 / 3, 1, 1), atol=1e-4)
    assert P @ shares == pytest.approx(np.minimum(P, Q).sum(), abs=1e-4)
    assert P @ shares == pytest.approx(0.6, abs=1e-4)


def test_a_teacher_that_trusts_everything_leaves_vanilla() -> None:
    method = composed(gradient_of(ReverseKL(), when=Trusted()), exact(ForwardKL()), routing="exclusive")
    same_gradient(method, VANILLA, P, P, uniform=[0.999999] * 3)


def test_what_is_not_trusted_is_imitated_instead() -> None:
    method = composed(gradient_of(ReverseKL(), when=Trusted()), exact(ForwardKL()), routing="exclusive")
    found = spoken(method, uniform=[0.5] * 3).gradient
    np.testing.assert_allclose(found[0], P - Q, atol=1e-9)
    np.testing.assert_allclose(found[1:], spoken(VANILLA).gradient[1:], atol=1e-9)


# ---------------------------------------------------------------- D6 ExOPD
@given(distributions(), st.floats(0, 2))
def test_the_extrapolated_advantage_is_lambda_gain_less_own_gain(drawn: list[Floats], strength: float) -> None:
    p, q, b = drawn
    found = orders_of(composed(gradient_of(ReverseKL(), target=Extrapolate(strength))), p, q, b)[0]
    np.testing.assert_allclose(found, strength * np.log(q / b) - np.log(p / b), atol=1e-9)


@pytest.mark.parametrize("b", [B, np.array([0.05, 0.05, 0.9])])
def test_at_strength_one_the_reference_does_not_matter(b: Floats) -> None:
    for plain, beyond in ((gradient_of(ReverseKL()), gradient_of(ReverseKL(), target=Extrapolate(1.0))),
                          (exact(ForwardKL()), exact(ForwardKL(), target=Extrapolate(1.0)))):
        np.testing.assert_allclose(spoken(composed(beyond), b=b).gradient, spoken(composed(plain)).gradient, atol=1e-9)


@pytest.mark.parametrize("loss", [ForwardKL(), JSD(0.5), SkewReverse(0.1)])
@pytest.mark.parametrize("target", [Extrapolate(1.25), Veto(0.5), Interpolate(0.4)])
def test_a_policy_gradient_to_another_target_expects_its_divergences_gradient_or_is_refused(loss: Loss, target: object) -> None:
    """The target of one token is known up to a constant of the position, which only reverse KL does not mind."""
    try:
        branch = gradient_of(loss, target=target)
    except ValueError:
        return
    found = spoken(composed(branch), b=B).mean(P)
    np.testing.assert_allclose(found, spoken(composed(exact(loss, target=target)), b=B).gradient[0], atol=1e-6)


# ---------------------------------------------------------------- D7 cliff
def test_the_cliff_is_the_published_number() -> None:
    assert Cliff(teacher_mass=0.999, start_mass=0.9, clip=5.0).highest == pytest.approx(1.3495, abs=1e-4)
    assert Cliff(teacher_mass=1 - 3.3e-4, start_mass=0.5, clip=5.0).highest == pytest.approx(1.22, abs=5e-3)


def test_at_the_cliff_what_is_not_structure_keeps_what_the_clip_can_bring_back() -> None:
    strength = Cliff(teacher_mass=0.999, start_mass=0.9, clip=5.0).highest
    q, b = column(*np.log([0.999, 0.001]))[None], column(*np.log([0.9, 0.1]))[None]
    target = Extrapolate(strength)
    left = float(normalised(aim(q, q, b, target), q, target)[0, 1].exp())
    assert left == pytest.approx(1.93e-4, abs=1e-6)
    assert left == pytest.approx(0.001 / 5, rel=0.05)


def test_without_room_for_the_ratio_there_is_no_extrapolation() -> None:
    assert Cliff(clip=1 + 1e-12).highest == pytest.approx(1)


@given(st.floats(1.001, 50), st.floats(1.001, 50))
def test_a_larger_clip_allows_more_extrapolation(one: float, other: float) -> None:
    assume(other - one > 1e-6)
    assert Cliff(clip=one).highest < Cliff(clip=other).highest


def test_the_guard_holds_the_wish_and_never_raises_it() -> None:
    assert Cliff(value=1.25).at(0.5) == 1.25
    assert Cliff(value=9.0).at(0.5) == pytest.approx(1.3495, abs=1e-4)


# ---------------------------------------------------------------- D8 PACED
def test_prompts_weigh_the_published_products_of_their_pass_rates() -> None:
    found = weighed(PassRate(), {}, 9, pass_rate=np.arange(9) / 8)
    np.testing.assert_allclose(found[:5], (0, 0.109, 0.1875, 0.234, 0.25), atol=5e-4)
    np.testing.assert_allclose(found, found[::-1], atol=1e-12)


def test_a_prompt_that_nobody_graded_weighs_nothing() -> None:
    assert weighed(PassRate(), {}, 1, pass_rate=[float("nan")]).tolist() == [0]


# ---------------------------------------------------------------- E1 SOD
def by_steps(means: Sequence[float]) -> Floats:
    """The weight of each step, of two tokens, whose mean |D| is given."""
    apart = np.array([[mean * 0.5, -mean * 1.5] for mean in means]).ravel()
    facts = facts_of(logp=np.zeros(len(apart)), logq=apart)
    found = weighed(StepRatio(), facts, len(apart), segment=np.repeat(np.arange(len(means)), 2))
    np.testing.assert_array_equal(found[::2], found[1::2])
    return found[::2]


def test_step_weights_are_the_published_ones() -> None:
    np.testing.assert_allclose(by_steps((0.1, 0.3, 0.15)), (1, 0.3333, 0.6667), atol=1e-4)
    np.testing.assert_allclose(by_steps((0.3, 0.1)), (1, 1.2))


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6))
def test_step_weights_are_the_capped_products_of_neighbouring_ratios(means: list[float]) -> None:
    e = 1e-6
    ratios = [(a + e) / (b + e) for a, b in pairwise(means)]
    expected = [min(float(np.prod(ratios[:k])), 1.2) if k else 1.0 for k in range(len(means))]
    np.testing.assert_allclose(by_steps(means), expected, rtol=1e-9)


# ---------------------------------------------------------------- E2 TIP
def test_a_soft_or_of_entropy_and_divergence_is_the_published_one() -> None:
    found = score(EntropyOrDivergence(), facts_of(entropy=[0, 0.6, 1], divergence=[0, 0.5, 1]), torch.ones(3, dtype=torch.bool))
    np.testing.assert_allclose(found, (0, 0.8, 1))


def test_keeping_the_whole_is_keeping_everything() -> None:
    facts = facts_of(entropy=[0.3, 0.6, 1], divergence=[0, 0.5, 1])
    np.testing.assert_array_equal(weighed(Keep(EntropyOrDivergence(), 1.0), facts, 3), 1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1), st.sampled_from(["step", "answer"]))
def test_the_kept_share_is_the_best_of_its_population(seed: int, count: int, fraction: float, over: str) -> None:
    rng = np.random.default_rng(seed)
    rows, entropy = np.sort(rng.integers(0, 3, count)), rng.permutation(count) * 1.0
    found = weighed(Keep(EntropyScore(), fraction, over, "none"), facts_of(entropy=entropy), count, row=rows)  # type: ignore[arg-type]
    for members in [np.arange(count)] if over == "step" else [np.flatnonzero(rows == row) for row in set(rows.tolist())]:
        share = max(1, round(fraction * len(members)))
        assert set(members[found[members] == 1]) == set(members[np.argsort(entropy[members])[-share:]])


# ---------------------------------------------------------------- E3 TA-OPD
def test_disagreement_outside_the_students_support_teaches_nothing_however_large() -> None:
    divergence, agreement = np.linspace(0, 1, 20), np.linspace(0.5, 1, 20)
    divergence[7], agreement[7] = 100.0, 0.0
    facts = facts_of(divergence=divergence, agreement=agreement)
    found = weighed(Keep(Teachability(), 0.1, normaliser="none"), facts, 20)
    assert found[7] == 0
    assert set(np.flatnonzero(found)) == {18, 19}


def test_agreement_is_the_teachers_mass_on_the_students_candidates() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(40))
    look = look_at(torch.tensor(np.log(p))[None], whole(q, [0]))
    found = Observed(look, composed(exact(ReverseKL(), weight=(Keep(Teachability()),))))["agreement"]
    assert float(found) == pytest.approx(q[np.argsort(p)[-16:]].sum())


# ---------------------------------------------------------------- E4 Rock Tokens
def test_no_rocks_is_vanilla() -> None:
    method = composed(exact(ReverseKL(), weight=(RockTokens(fraction=0.0),)))
    same_gradient(method, composed(exact(ReverseKL())))


def test_rocks_are_the_ids_of_most_divergence_times_frequency() -> None:
    facts = facts_of(divergence=[5, 1, 1, 1, 1, 1, 1, 0.1])
    found = weighed(RockTokens(fraction=0.34), facts, 8, ids=[7, 3, 3, 3, 3, 3, 3, 4])  # sums: 5, 6, .1
    np.testing.assert_array_equal(found, (1, 0, 0, 0, 0, 0, 0, 1))


# ---------------------------------------------------------------- E5 Prefix Teach
def test_the_published_series_changes_at_its_fifth_value() -> None:
    assert downward_change(column(1, 1.1, 0.9, 1, 0.2, 0.1, 0.15, 0.2), 0.5) == 4


@pytest.mark.parametrize("series", [
    [1.0] * 8, [0.2, 0.1, 0.15, 0.2, 1, 1.1, 0.9, 1], [1, 1, 0.2, 0.2, 0.2], [1, 0.9, 1.1, 1, 0.95, 1.05, 1, 0.98],
], ids=["constant", "upward", "too short", "noise"])
def test_a_series_that_does_not_drop_has_no_change(series: list[float]) -> None:
    assert downward_change(column(*series), 0.5) is None


@pytest.mark.parametrize("at", [1, 6])
def test_one_outlier_hides_no_change(at: int) -> None:
    series = np.array([1, 1.1, 0.9, 1, 0.2, 0.1, 0.15, 0.2])
    series[at] = 100
    assert downward_change(column(*series), 0.5) == 4


def test_what_follows_the_change_is_masked_and_the_rest_carries_its_mass() -> None:
    margins = np.repeat([1, 1.1, 0.9, 1, 0.2, 0.1, 0.15, 0.2], 2)
    found = weighed(ChangePoint(segment=2), facts_of(margin=margins), 16)
    np.testing.assert_allclose(found, [2.0] * 8 + [0.0] * 8)


def test_the_margin_is_top_less_mean_over_the_students_candidates() -> None:
    look = look_at(torch.tensor(np.log(P))[None], whole(Q, [0]))
    found = Observed(look, composed(exact(ReverseKL(), weight=(ChangePoint(k=2),))))["margin"]
    assert float(found) == pytest.approx(np.log(0.5) - np.log([0.2, 0.5]).mean())


# ---------------------------------------------------------------- E9 SafeSteer
def test_a_slice_of_everything_is_exact_reverse_kl_and_a_smaller_one_keeps_raw_masses() -> None:
    everything = composed(Branch(loss=ReverseKL(), support=VocabularySlice((0, 1, 2))))
    same_gradient(everything, composed(exact(ReverseKL())))
    found = spoken(composed(Branch(loss=ReverseKL(), support=VocabularySlice((0, 2))))).loss
    np.testing.assert_allclose(found, (P * np.log(P / Q))[[0, 2]].sum())


# ---------------------------------------------------------------- F1, F2 rewards
@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo"])
def test_equal_rewards_are_no_advantage(kind: str) -> None:
    np.testing.assert_array_equal(advantages(np.full(5, 0.3), Advantage(kind)), 0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- F8 TSD-KD
def test_relative_confidence_is_the_sigmoid_of_the_entropies_difference() -> None:
    method = composed(exact(JSD(0.9), weight=(RelativeConfidence(),)))
    np.testing.assert_allclose(orders_of(method)[0], 1 / (1 + np.exp(1.02965 - 0.89795)), atol=1e-5)


def test_high_entropy_leaves_out_the_lowest_tenth() -> None:
    found = holds(HighEntropy(0.1), facts_of(entropy=np.arange(11)), tokens(11))
    assert found.tolist() == [False] + [True] * 10


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99))
def test_early_tokens_are_those_until_their_answer_has_reached_its_share_of_entropy(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(3), rng.integers(1, 8, 3))
    entropy = rng.exponential(size=len(rows))
    found = holds(Early(share), facts_of(entropy=entropy), tokens(len(rows), row=rows)).numpy()
    for row in range(3):
        reached = np.cumsum(entropy[rows == row]) >= share * entropy[rows == row].sum()
        assert found[rows == row].sum() == reached.argmax() + 1
        assert (np.diff(found[rows == row].astype(int)) <= 0).all()


def test_its_entropy_is_minimised() -> None:
    found = spoken(composed(Branch(loss=Entropy())))
    np.testing.assert_allclose(found.loss, 0.89795, atol=1e-5)
    np.testing.assert_allclose(found.gradient[0], slope(lambda p: float(-(p * np.log(p)).sum()), P), atol=1e-7)


@given(distributions())
def test_the_list_loss_is_the_probability_of_drawing_the_teachers_order(drawn: list[Floats]) -> None:
    p, q, _ = drawn
    found = plackett_luce(Cells(torch.tensor(np.log(p))[None], torch.tensor(np.log(q))[None]), len(p))
    order = np.argsort(-q)
    expected = -sum(np.log(p[order[i]] / p[order[i:]].sum()) for i in range(len(p)))
    assert float(found) == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- G1 KDRL
GRPO = composed(gradient_of(Advantage()))
REWARDED = {"advantage": [0.5, -1.0, 2.0]}


def test_without_its_distillation_kdrl_is_grpo() -> None:
    same_gradient(composed(gradient_of(Advantage()), gradient_of(ReverseKL(), scale=0.0)), GRPO, **REWARDED)


def test_right_answers_are_not_distilled() -> None:
    method = composed(gradient_of(ReverseKL(), when=Incorrect()))
    np.testing.assert_allclose(orders_of(method, correct=[1.0, 0.0, np.nan])[0], (0, D[1], 0))


# ---------------------------------------------------------------- G2 RLAD
def test_the_teachers_ratio_is_the_published_one() -> None:
    facts = facts_of(logp=[log(0.33)], logq=[log(0.5)], log_ratio=[log(0.33 / 0.3)])
    found = correct(column(1.0), TeacherRatio(alpha=0.5), facts, tokens(1))
    assert float(found) == pytest.approx(0.85206, abs=1e-5)


@given(distributions(), st.integers(0, 2**32 - 1))
def test_a_teacher_without_a_share_in_the_ratio_leaves_grpo(drawn: list[Floats], seed: int) -> None:
    p, q, mu = drawn
    reward = np.random.default_rng(seed).normal(size=len(p))
    alone, clipped = (
        spoken(composed(gradient_of(Advantage()), correction=c), p, q, mu=mu, advantage=reward).gradient
        for c in (TeacherRatio(alpha=1.0, low=0.2, high=0.28), ClippedRatio(low=0.2, high=0.28))
    )
    np.testing.assert_allclose(alone, clipped, atol=1e-9)


@given(distributions(), st.floats(0, 1))
def test_a_teacher_in_the_ratio_never_turns_a_reward_around(drawn: list[Floats], alpha: float) -> None:
    p, q, mu = drawn
    reward = np.linspace(-1, 1, len(p))
    found = orders_of(composed(gradient_of(Advantage()), correction=TeacherRatio(alpha)), p, q, logmu=np.log(mu), advantage=reward)[0]
    assert (found * reward >= 0).all()


def test_grpo_with_the_teacher_in_its_ratio_needs_a_teacher() -> None:
    assert composed(gradient_of(Advantage()), correction=TeacherRatio()).needs_teacher


# ---------------------------------------------------------------- G3 LUFFY
@pytest.mark.parametrize(("p", "coefficient"), [(0.01, 0.0826), (0.9, 0.09)])
def test_off_policy_tokens_have_the_published_coefficients(p: float, coefficient: float) -> None:
    assert bent(OffPolicyShape(0.1), [1.0], facts_of(logp=[log(p)]))[0] == pytest.approx(coefficient, abs=1e-4)


@given(distributions(), st.floats(0.01, 1))
def test_off_policy_tokens_have_the_gradient_of_p_over_p_plus_gamma(drawn: list[Floats], gamma: float) -> None:
    p = drawn[0]
    found = spoken(composed(gradient_of(Likelihood(), shape=(OffPolicyShape(gamma),))), p, p).gradient
    for y in range(len(p)):
        np.testing.assert_allclose(-found[y], slope(lambda x, y=y: x[y] / (x[y] + gamma), p), atol=1e-7)


def test_off_policy_tokens_are_not_clipped_and_the_students_own_are() -> None:
    method = methods.load("luffy")
    facts = facts_of(logp=[log(0.3)] * 2, logq=[0, 0], log_ratio=[5.0, 5.0])
    orders = instruct(facts, tokens(2, author=[0, 1], advantage=[1.0, 1.0]), method.at(0.0)).sum(0)
    assert orders.tolist() == pytest.approx([0, 0.1 * 0.3 / 0.4**2])


# ---------------------------------------------------------------- G5 SCOPE
def of_answers(values: Sequence[Sequence[float]]) -> tuple[list[float], list[int]]:
    return [x for answer in values for x in answer], [row for row, answer in enumerate(values) for _ in answer]


def test_right_answers_weigh_by_the_published_surprise() -> None:
    logp, rows = of_answers(((-0.2, -0.8), (-1.0, -0.5, -1.5)))
    found = weighed(GroupSoftmax("student_surprise"), facts_of(logp=logp, logq=np.zeros(5)), 5, row=rows)
    np.testing.assert_allclose(found, [0.75508] * 2 + [1.24492] * 3, atol=1e-5)


def test_wrong_answers_weigh_by_the_published_likelihood() -> None:
    logq, rows = of_answers(((-0.4,), (-1.0, -1.4)))
    found = weighed(GroupSoftmax("teacher_likelihood"), facts_of(logp=np.zeros(3), logq=logq), 3, row=rows)
    np.testing.assert_allclose(found, [1.37995] + [0.62005] * 2, atol=1e-5)


def test_only_answers_that_the_branch_speaks_to_share_its_weight() -> None:
    logq, rows = of_answers(((-0.4,), (-5.0,), (-1.2,)))
    found = weighed(GroupSoftmax(), facts_of(logp=np.zeros(3), logq=logq), 3, active=[True, False, True], row=rows)
    np.testing.assert_allclose(found[[0, 2]], (1.37995, 0.62005), atol=1e-5)


def test_groups_do_not_share() -> None:
    logq, rows = of_answers(((-0.4,), (-5.0,), (-1.2,)))
    found = weighed(GroupSoftmax(), facts_of(logp=np.zeros(3), logq=logq), 3, row=rows, group=[0, 1, 0])
    np.testing.assert_allclose(found, (1.37995, 1, 0.62005), atol=1e-5)


def test_the_two_branches_of_scope_speak_to_right_and_to_wrong_answers() -> None:
    right, wrong = (branch.when for branch in methods.load("scope").branches)
    known = tokens(3, correct=[1.0, 0.0, np.nan])
    assert holds(right, {}, known).tolist() == [True, False, False]
    assert holds(wrong, {}, known).tolist() == [False, True, False]
    assert isinstance(right, Correct)
    assert isinstance(wrong, Incorrect)


# ---------------------------------------------------------------- G6 Uni-OPD
def shifted(means: Sequence[float], correct: Sequence[float], **columns: object) -> Floats:
    return bent(MarginShift(0.4), means, row=range(len(means)), correct=correct, **columns) - np.array(means)


def test_answers_are_shifted_apart_by_the_published_half_margin() -> None:
    np.testing.assert_allclose(shifted((-0.3, -0.2, -0.1), (1, 1, 0)), (0.275, 0.275, -0.275))


@pytest.mark.parametrize("correct", [(1, 1, 1), (0, 0, 0), (np.nan, np.nan, np.nan)], ids=["right", "wrong", "ungraded"])
def test_a_group_of_one_kind_is_not_shifted(correct: Sequence[float]) -> None:
    np.testing.assert_array_equal(shifted((-0.3, -0.2, -0.1), correct), 0)


def test_a_group_that_keeps_the_margin_is_not_shifted() -> None:
    np.testing.assert_array_equal(shifted((0.5, 0.3, -0.1), (1, 1, 0)), 0)


def test_margins_are_of_answers_and_not_of_tokens() -> None:
    long = bent(MarginShift(0.4), [-0.3, -0.2, -0.2, -0.2, -0.1], row=[0, 1, 1, 1, 2], correct=[1, 1, 1, 1, 0])
    np.testing.assert_allclose(long - [-0.3, -0.2, -0.2, -0.2, -0.1], [0.275] * 4 + [-0.275])


@given(st.integers(0, 2**32 - 1))
def test_after_the_shift_every_mixed_group_has_the_margin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(8), rng.integers(1, 4, 8))
    group, correct, a = rows // 4, (rows % 2).astype(float), rng.normal(size=len(rows))
    found = bent(MarginShift(0.4), a, row=rows, group=group, correct=correct)
    for one in (0, 1):
        right, wrong = (
            np.mean([found[rows == row].mean() for row in set(rows[(group == one) & (correct == kind)].tolist())]) for kind in (1, 0)
        )
        assert right - wrong >= 0.4 - 1e-9


def test_log_ratios_of_ten_and_more_are_dropped() -> None:
    np.testing.assert_array_equal(bent(DropBeyond(10.0), (9.99, 10.0, -10.5, -3.0)), (9.99, 0, 0, -3))


# ---------------------------------------------------------------- G7 OPDVR
@pytest.mark.parametrize(("correct", "expected"), [(1.0, (0, 0.511, 1.099)), (0.0, (-1.099, 0, 0)), (np.nan, (0, 0, 0))])
def test_a_verdict_lets_only_its_own_sign_through(correct: float, expected: Sequence[float]) -> None:
    np.testing.assert_allclose(bent(OutcomeGate(), D, correct=[correct] * 3), expected, atol=1e-3)


# ---------------------------------------------------------------- G9 AMR-SD
def test_gains_modulate_rewards_up_by_one_share_and_down_by_another() -> None:
    facts = facts_of(logp=[-2, -2, -2, -2], logq=[-1.5, -1.5, -1.95, -3])
    found = bent(Modulate(0.2, 0.1, threshold=0.1), (1.0, -1.0, 1.0, 1.0), facts)
    np.testing.assert_allclose(found, (1.08, -1.04, 1.0, 1.0))


def test_a_modulation_that_has_faded_is_grpo_and_one_that_has_not_needs_a_teacher() -> None:
    method = composed(gradient_of(Advantage(), shape=(Modulate(0.0, 0.0),)))
    same_gradient(method, GRPO, **REWARDED)
    assert method.needs_teacher


# ---------------------------------------------------------------- G8, G10 schedules
def test_a_teachers_proposal_that_counts_nothing_leaves_grpo() -> None:
    method = composed(gradient_of(Advantage()), exact(ForwardKL(), scale=Linear(1.0, 0.0)))
    same_gradient(method.at(1.0), GRPO, **REWARDED)


def test_a_switch_that_never_comes_is_distillation_and_one_at_once_reward_alone() -> None:
    distil, reward = (gradient_of(ReverseKL()),), (gradient_of(Advantage()),)

    def switched(at: float) -> Method:
        return composed(stages=(Stage(until=at, branches=distil), Stage(until=float("inf"), branches=reward)))

    for progress in (0.0, 0.5, 1.0):
        assert switched(float("inf")).at(progress).branches == distil
        assert switched(0.0).at(progress).branches == reward
    assert switched(0.5).at(0.49).branches == distil
    assert switched(0.5).at(0.5).branches == reward


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.01, 1), st.floats(0, 1))
def test_schedules_stay_between_their_ends_and_arrive(start: float, end: float, until: float, progress: float) -> None:
    for schedule in (Linear(start, end, until), Cosine(start, end, until)):
        assert schedule.at(0.0) == pytest.approx(start, abs=1e-9)
        assert schedule.at(max(until, progress)) == pytest.approx(end, abs=1e-9) or progress < until
        assert min(start, end) - 1e-9 <= schedule.at(progress) <= max(start, end) + 1e-9


def test_a_settled_branch_has_a_plain_number_wherever_one_moved() -> None:
    branch = gradient_of(
        ReverseKL(), when=Horizon(Linear(10, 20)), target=Extrapolate(Cliff(value=9.0)), shape=(Modulate(positive=Cosine(1, 0)),),
        weight=(Keep(fraction=Linear(1.0, 0.5)),), scale=Linear(0, 2),
    )
    expected = gradient_of(
        ReverseKL(), when=Horizon(15), target=Extrapolate(Cliff().highest), shape=(Modulate(positive=0.5),),
        weight=(Keep(fraction=0.75),), scale=1.0,
    )
    assert settled(branch, 0.5) == expected


# ---------------------------------------------------------------- H routed teachers
def test_the_hard_gate_lets_ratios_in_its_band_through() -> None:
    facts = facts_of(log_ratio=np.log([0.49, 1.0, 2.01, 0.5 + 1e-9, 2.0 - 1e-9]))
    found = correct(torch.ones(5, dtype=torch.float64), HardGate(0.5, 2.0), facts, tokens(5))
    np.testing.assert_allclose(found, (0, 1, 0, 0.5, 2), atol=1e-6)


# ---------------------------------------------------------------- other shapes, by their definitions
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.1, 20))
def test_bounds_are_kept_and_signs_too(values: list[float], limit: float) -> None:
    clipped, soft = bent(Clip(limit), values), bent(SoftLog(), values)
    assert (abs(clipped) <= limit).all()
    np.testing.assert_allclose(soft, np.sign(values) * np.log1p(np.abs(values)), atol=1e-12)
    assert (soft * values >= 0).all()


@given(distributions())
def test_total_variation_is_a_distance_between_zero_and_one(drawn: list[Floats]) -> None:
    p, q, r = drawn
    there, back = divergence(TotalVariation(), p, q), divergence(TotalVariation(), q, p)
    assert 0 <= there <= 1
    assert there == pytest.approx(back)
    assert there <= divergence(TotalVariation(), p, r) + divergence(TotalVariation(), r, q) + 1e-12


SUPPORTS: list[Support] = [Union(), TeacherTop(2), StudentTop(2), FullVocabulary()]


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_target_is_aimed_at_over_the_cells_of_its_support(support: Support) -> None:
    logits = torch.tensor(softmax(np.array([1.0, 0.0, 2.0, -1.0]))).log()[None]
    q = softmax(np.array([0.0, 1.0, 1.5, 0.5]))
    found = told(logits, whole(q, [0]), composed(Branch(loss=ForwardKL(), support=support, target=Veto(0.5)))).loss
    p, kept = logits[0].exp().numpy(), {Union(): [0, 1, 2, 3], FullVocabulary(): [0, 1, 2, 3], TeacherTop(2): [1, 2], StudentTop(2): [0, 2]}
    ids = kept[support]
    cells = [[i] for i in ids] + ([[i for i in range(4) if i not in ids]] if len(ids) < 4 else [])
    of = [np.array([x[cell].sum() for cell in cells]) for x in (p, q)]
    aimed = of[1] * of[0] ** 0.5
    assert float(found) == pytest.approx(kl(aimed / aimed.sum(), of[0]), abs=1e-6)
