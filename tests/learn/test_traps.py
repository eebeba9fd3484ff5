"""The traps of core.md section 6, each a regression test; and what records say of a token before any model is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamopd import methods, slots
from streamopd.config import Evaluate
from streamopd.learn.advantage import advantages
from streamopd.learn.known import known_of
from streamopd.learn.objective import Known, Observed, Target, instruct
from streamopd.learn.objective.cells import Cells
from streamopd.learn.objective.divergence import coefficient, diverge, kl_student_teacher, kl_teacher_student
from streamopd.learn.objective.pool import pooled
from streamopd.learn.objective.shape import skewed_floor
from streamopd.learn.rows import Row
from streamopd.learn.trainer import Trainer
from streamopd.schemas import Array, Author, Batch, Outcome, Rollout, Span
from streamopd.slots import (
    JSD,
    Advantage,
    AgeDecay,
    ArgmaxCrossEntropy,
    AtLeastFloor,
    Baseline,
    Branch,
    ChangePoint,
    Clip,
    ClippedRatio,
    Correct,
    DropBeyond,
    Early,
    Entropy,
    EntropyOrDivergence,
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
    Intersection,
    Keep,
    Likelihood,
    ListwiseRanking,
    LogRatio,
    MarginShift,
    Method,
    Modulate,
    OffPolicyShape,
    OutcomeGate,
    PassRate,
    Power,
    RelativeConfidence,
    Return,
    ReverseKL,
    RockTokens,
    SecondMomentBudget,
    Sign,
    SoftLog,
    StepRatio,
    StudentTop,
    Support,
    Teachability,
    TeacherAccepts,
    TeacherEntropy,
    TeacherPrefers,
    TeacherRatio,
    TeacherTop,
    TruncatedRatio,
    Trusted,
    Union,
    VocabularySlice,
    WrittenBy,
)

from .positions import Floats, P, Q, composed, exact, gradient_of, kl, known_about, look_at, spoken, told, whole

D = np.log(Q) - np.log(P)
TrainerOpener = Callable[..., Trainer]
BatchMaker = Callable[..., Batch]


def rows_of(distribution: Floats) -> Tensor:
    return torch.tensor(np.log(distribution))[None]


# ---------------------------------------------------------------- 1: names by argument order
def test_reverse_is_from_the_student_and_forward_from_the_teacher() -> None:
    assert float(kl_student_teacher(rows_of(P), rows_of(Q))) == pytest.approx(0.396058, abs=1e-6)
    assert float(kl_teacher_student(rows_of(P), rows_of(Q))) == pytest.approx(0.365274, abs=1e-6)
    cells = Cells(rows_of(P), rows_of(Q))
    assert float(diverge(cells, ReverseKL())) == float(kl_student_teacher(cells.p, cells.q))
    assert float(diverge(cells, ForwardKL())) == float(kl_teacher_student(cells.p, cells.q))


def test_swapping_student_and_teacher_swaps_the_divergences() -> None:
    assert float(diverge(Cells(rows_of(Q), rows_of(P)), ReverseKL())) == pytest.approx(kl(Q, P))


# ---------------------------------------------------------------- 2: estimators
def test_no_loss_is_an_estimator_to_be_back_propagated_by_mistake() -> None:
    names = {kind.__name__.lower() for kind in get_args(slots.Loss)}
    assert not {"k1", "k2", "k3"} & names
    assert set(get_args(slots.Form)) == {"direct", "stop_gradient", "per_candidate", "policy_gradient"}


@pytest.mark.parametrize("loss", [Power(), Advantage()])
@pytest.mark.parametrize("form", ["direct", "stop_gradient", "per_candidate"])
def test_a_coefficient_of_the_written_token_is_refused_in_any_other_form(loss: slots.Loss, form: str) -> None:
    with pytest.raises(ValueError, match=f'{type(loss).__name__} is a coefficient .* not "{form}"'):
        Branch(loss=loss, form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [Entropy(), slots.ReferenceKL(), ListwiseRanking(), ArgmaxCrossEntropy(), GoldOrGuess()])
def test_a_sum_over_candidates_is_refused_as_a_policy_gradient(loss: slots.Loss) -> None:
    with pytest.raises(ValueError, match=f"{type(loss).__name__} sums over candidates"):
        Branch(loss=loss, form="policy_gradient")


def test_a_shape_of_coefficients_is_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match='bends coefficients of form "policy_gradient"; this branch is "direct"'):
        Branch(loss=ReverseKL(), shape=(Clip(),))


# ---------------------------------------------------------------- 3: ends of JSD
@pytest.mark.parametrize(("beta", "limit"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
def test_the_ends_of_jensen_shannon_are_not_zero_in_either_form(beta: float, limit: slots.Loss) -> None:
    for kind in (exact, gradient_of):
        found = spoken(composed(kind(JSD(beta))))
        assert abs(found.mean(P)).max() > 0.1
        np.testing.assert_allclose(found.gradient, spoken(composed(kind(limit))).gradient, atol=1e-9)


# ---------------------------------------------------------------- 4: renormalised top-1, supports that do not see the student
@pytest.mark.parametrize("support", [
    TeacherTop(1, "renorm"), StudentTop(1, "renorm"), Intersection(1, "renorm"), VocabularySlice((7,), "renorm"),
    Union(student_k=0, teacher_k=1, sampled=False, stop=False, remainder="renorm"),
    Union(student_k=0, teacher_k=0, sampled=True, stop=False, remainder="renorm"),
], ids=["teacher", "student", "intersection", "slice", "union of one", "union of the sampled"])
def test_one_renormalised_id_is_refused(support: Support) -> None:
    with pytest.raises(ValueError, match="One id that takes all mass on both sides"):
        Branch(support=support)


@pytest.mark.parametrize("form", ["stop_gradient", "per_candidate"])
def test_one_renormalised_id_is_refused_in_every_form_that_looks_at_it(form: str) -> None:
    with pytest.raises(ValueError, match="One id"):
        Branch(support=TeacherTop(1, "renorm"), form=form)  # type: ignore[arg-type]


def test_a_tail_sees_what_the_student_wastes_outside_the_teachers_support_and_renormalisation_does_not() -> None:
    blind = spoken(composed(Branch(support=TeacherTop(2, "renorm")))).gradient[0]
    seeing = spoken(composed(Branch(support=TeacherTop(2, "tail")))).gradient[0]
    np.testing.assert_allclose(blind, (0, 0.11021, -0.11021), atol=1e-5)
    assert seeing[0] > 0.4  # of the .6 that it puts there


# ---------------------------------------------------------------- 5: the floor
def test_the_floor_is_log_lambda_over_one_minus_lambda() -> None:
    assert skewed_floor(0.2) == pytest.approx(-2.0118, abs=1e-4)
    assert float(bend_all(Floor(0.2), -25.0)) == pytest.approx(-2.0118, abs=1e-4)
    assert skewed_floor(0.2) != pytest.approx(np.log(0.2 / 0.8), abs=0.1)  # −1.3863


def bend_all(shape: slots.Shape, value: float) -> Tensor:
    facts = {"logp": torch.tensor([0.0]), "logq": torch.tensor([value])}
    return instruct(facts, known_about(torch.tensor([0])), composed(gradient_of(ReverseKL(), shape=(shape,))))


# ---------------------------------------------------------------- 6: the list loss
def ranked(best: float, worse: float) -> float:
    """The list loss of a student with these scores of two ids, the first of which the teacher likes better."""
    p = torch.tensor([[best, worse]], dtype=torch.float64).log_softmax(-1)
    return float(diverge(Cells(p, rows_of(np.array([0.7, 0.3]))), ListwiseRanking(2)))


def test_ranking_as_the_teacher_does_has_the_published_loss_and_the_reverse_a_larger_one() -> None:
    assert ranked(2, 1) == pytest.approx(0.3133, abs=1e-4)
    assert ranked(1, 2) == pytest.approx(1.3133, abs=1e-4)


def test_the_list_loss_draws_the_teachers_favourite_up() -> None:
    p = torch.log(torch.tensor([[0.2, 0.3, 0.5]])).requires_grad_()
    diverge(Cells(p, rows_of(np.array([0.6, 0.3, 0.1])).float()), ListwiseRanking(3)).sum().backward()
    assert p.grad is not None
    assert p.grad[0, 0] < 0 < p.grad[0, 2]


# ---------------------------------------------------------------- 7: LUFFY
def test_off_policy_shaping_runs_through_the_derivative_and_stresses_unlikely_tokens() -> None:
    facts = {"logp": torch.log(torch.tensor([0.1, 0.9]))}
    method = composed(gradient_of(Likelihood(), shape=(OffPolicyShape(0.1),)))
    unlikely, likely = instruct(facts, known_about(torch.tensor([0, 1])), method)[0].tolist()
    assert unlikely > likely
    assert likely == pytest.approx(0.09, abs=1e-4)  # as a detached weight it would be .9, and the larger one


# ---------------------------------------------------------------- 8: RLAD
def test_rlad_is_one_term_whose_ratio_holds_the_teacher_and_adds_nothing() -> None:
    method = methods.load("rlad")
    (branch,) = method.branches
    assert isinstance(branch.loss, Advantage)
    assert isinstance(method.correction, TeacherRatio)
    np.testing.assert_array_equal(spoken(method, advantage=[0.0] * 3).gradient, 0)  # no reward: the teacher alone teaches nothing


# ---------------------------------------------------------------- 9: EOPD
def test_eopd_adds_forward_kl_where_the_teacher_is_unsure_and_drops_no_token() -> None:
    method = methods.load("eopd")
    sure = np.array([0.97, 0.02, 0.01])
    both, alone = (spoken(method, P, q).gradient for q in (Q, sure))
    gradient = [spoken(msgspec.structs.replace(method, branches=method.branches[:1]), P, q).gradient for q in (Q, sure)]
    np.testing.assert_allclose(alone, gradient[1], atol=1e-9)
    np.testing.assert_allclose(both, gradient[0] + (P - Q), atol=1e-6)
    assert (abs(both).max(1) > 0).all()


# ---------------------------------------------------------------- 10: whitening
REWARDED = composed(gradient_of(Advantage(), scale=2.0), gradient_of(ReverseKL(), scale=0.5))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_rewards_do_not_move_the_weight_of_distillation(rewards: list[float]) -> None:
    look = look_at(torch.tensor(np.log(P)).repeat(3, 1), whole(Q), logmu=np.log(P), advantage=rewards)
    reward, distilled = instruct(Observed(look, REWARDED), look.known, REWARDED).numpy()
    np.testing.assert_allclose(distilled, 0.5 * D, atol=1e-7)
    np.testing.assert_allclose(reward, np.array(rewards) * 2, rtol=1e-6, atol=1e-30)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0.1, 100), st.sampled_from(["grpo", "mean", "rloo"]))
def test_advantages_are_of_rewards_and_whitening_is_theirs_alone(rewards: list[float], scale: float, kind: str) -> None:
    found = advantages(np.array(rewards), Advantage(kind))  # type: ignore[arg-type]
    assert found.mean() == pytest.approx(0, abs=1e-6)
    if kind != "grpo" and np.ptp(rewards) > 1e-3:
        np.testing.assert_allclose(advantages(np.array(rewards) * scale, Advantage(kind)), found * scale, atol=1e-6)  # type: ignore[arg-type]


# ---------------------------------------------------------------- 11: log mu
@pytest.mark.parametrize("branch", [
    gradient_of(ReverseKL()), gradient_of(ForwardKL(), shape=(Baseline(k=0), Clip(1.0))), exact(JSD(0.5)), gradient_of(Advantage()),
])
def test_without_a_ratio_the_kernel_that_sampled_does_not_matter(branch: Branch) -> None:
    reward = [1.0, -1.0, 0.5]
    fresh, stale = (spoken(composed(branch), mu=mu, advantage=reward).gradient for mu in (P, np.array([0.05, 0.05, 0.9])))
    np.testing.assert_array_equal(fresh, stale)


# ---------------------------------------------------------------- 12: stop ids
ENDS = (2, 3)
STUDENT, TEACHER = np.array([0.1, 0.2, 0.699, 0.001]), np.array([0.1, 0.2, 0.001, 0.699])
AGREE: list[Branch] = [
    *(exact(loss) for loss in (ReverseKL(), ForwardKL(), JSD(0.5))),
    *(Branch(loss=ReverseKL(), support=support) for support in (
        Union(), TeacherTop(1), StudentTop(1), Intersection(1), TeacherTop(2, "renorm"), VocabularySlice((0,), "tail")
    )),
    Branch(loss=ReverseKL(), form="stop_gradient", support=StudentTop(2, "drop")),
    *(gradient_of(loss) for loss in (ReverseKL(), ForwardKL(), JSD(0.5), Power())),
    Branch(loss=GoldOrGuess()),
]


@pytest.mark.parametrize("branch", AGREE, ids=lambda b: f"{type(b.loss).__name__}-{b.form}-{type(b.support).__name__}")
def test_two_models_that_end_by_different_ids_are_of_one_mind(branch: Branch) -> None:
    found = spoken(composed(branch), STUDENT, TEACHER, stop_ids=ENDS).gradient
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_a_students_wish_to_end_is_accepted_by_a_teacher_that_ends_by_another_id() -> None:
    method = composed(exact(ReverseKL(), weight=(TeacherAccepts(k=1, otherwise=0.01),)))
    look = look_at(torch.tensor(np.log(STUDENT))[None], whole(TEACHER, [0], ENDS), ENDS)
    assert float(instruct(Observed(look, method), look.known, method)) == 1.0


def test_the_stop_class_is_a_cell_of_every_support_whether_or_not_its_ids_were_chosen() -> None:
    for support in (TeacherTop(1, "drop"), StudentTop(1, "drop"), Intersection(1, "drop"), VocabularySlice((0,), "drop"), Union()):
        look = look_at(torch.tensor(np.log(STUDENT))[None], whole(TEACHER, [0], ENDS), ENDS)
        cells = look.cells(support)
        held = (cells.q.exp() - 0.7).abs() < 1e-6
        assert held.any(), support
        torch.testing.assert_close(cells.p.exp()[held], torch.full_like(cells.p[held], 0.7))


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
@pytest.mark.parametrize("by_ids", [False, True], ids=["whole", "by ids"])
def test_teachers_that_end_by_different_ids_agree_to_end_in_a_pool(kind: str, by_ids: bool) -> None:
    views = [whole(q, [0], ENDS) for q in (STUDENT, TEACHER)]
    if by_ids:
        views = [view._replace(ids=torch.arange(4)[None], logp=view.support[:, 0]) for view in views]
    pool = pooled(views, (1, 1), kind, ENDS)  # type: ignore[arg-type]
    method = composed(exact(ReverseKL())) if not by_ids else composed(Branch())
    found = told(torch.tensor(np.log(STUDENT))[None], pool, method, ENDS).loss
    assert float(found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_that_looks_at_a_support_asks_for_the_stop_class(name: str) -> None:
    evidence = methods.load(name).evidence
    assert evidence.stop or evidence.full or evidence.hidden


def test_what_one_branch_asks_for_is_asked_whatever_another_does_without() -> None:
    narrow = Branch(support=Union(student_k=0, teacher_k=2, sampled=False, stop=False))
    evidence = composed(Branch(support=Union(student_k=2, teacher_k=4)), narrow).evidence
    assert evidence.stop
    assert evidence.sampled
    assert evidence.teacher_k == 4


# ---------------------------------------------------------------- 13: greedy evaluation
def test_held_out_answers_are_sampled_beside_greedy_unless_one_says_otherwise() -> None:
    assert Evaluate().sampled


# ---------------------------------------------------------------- 14: incomplete groups
@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo"])
@pytest.mark.parametrize("rewards", [[], [0.7], [1, 1, 1], [0, 0], [0.1 + 0.2, 0.3]], ids=["nobody", "one", "right", "wrong", "rounding"])
def test_a_group_with_nothing_to_compare_has_no_advantages(kind: str, rewards: list[float]) -> None:
    found = advantages(np.array(rewards, np.float64), Advantage(kind))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, np.zeros(len(rewards)))


def test_rewards_that_hardly_differ_are_not_blown_up() -> None:
    assert abs(advantages(np.array([0.5, 0.5 + 1e-6]), Advantage("grpo"))).max() < 0.01


def test_a_lone_answer_weighs_one() -> None:
    facts = {"logp": torch.tensor([-1.0, -2]), "logq": torch.tensor([-3.0, -4])}
    for of in ("student_surprise", "teacher_likelihood"):
        method = composed(gradient_of(Likelihood(), weight=(GroupSoftmax(of),)))  # type: ignore[arg-type]
        assert instruct(facts, known_about(torch.tensor([0, 1]), group=[0, 1], row=[0, 1]), method).tolist() == [[1, 1]]


# ---------------------------------------------------------------- 15: confidence
def test_percentages_as_weights_of_teachers_are_shares_and_not_one_hot() -> None:
    views = [whole(q, [0]) for q in (P, Q)]
    shares, percents = (pooled(views, weights, "arithmetic", ()).support for weights in ((0.6, 0.4), (60, 40)))
    torch.testing.assert_close(shares, percents, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(percents[0].exp(), 0.6 * P + 0.4 * Q, atol=1e-6)


# ---------------------------------------------------------------- 16: the global mean, and steps that are cut
SURVEYED = composed(
    gradient_of(
        ReverseKL(), shape=(Return(gamma=0.9), MarginShift(0.4), Sign()),
        weight=(Keep(LogRatio(), fraction=0.6), GroupSoftmax("teacher_likelihood")),
    ),
    Branch(when=HighEntropy(0.3), loss=Entropy(), scale=0.1),
    gradient_of(Advantage(), weight=(PassRate(), Keep(LogRatio(), fraction=0.5, over="answer"))),
    correction=SecondMomentBudget(budget=2.0),
)
KEPT_RETURNS = composed(
    gradient_of(ReverseKL(), shape=(Return(gamma=0.9),), weight=(Keep(), GroupSoftmax())), correction=TruncatedRatio(cap=5.0)
)


def gradients(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    trainer.train(batch)
    return {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}


def graded(batch: Batch, seed: int = 0) -> Batch:
    """The same answers, each with a verdict of its own."""
    rng = np.random.default_rng(seed)

    def verdict(rollout: Rollout) -> Rollout:
        right = bool(rng.integers(2))
        return msgspec.structs.replace(rollout, outcome=Outcome(float(right), right))

    items = [
        msgspec.structs.replace(
            item, group=msgspec.structs.replace(item.group, rollouts=[verdict(rollout) for rollout in item.group.rollouts])
        )
        for item in batch.items
    ]
    return msgspec.structs.replace(batch, items=items)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 120), st.integers(1, 30), st.permutations(range(4)), st.sampled_from([SURVEYED, KEPT_RETURNS]))
@example(1, 1, [0, 1, 2, 3], KEPT_RETURNS)  # answers to one prompt begin with equal entropies, at the border of what is kept
def test_a_surveyed_policy_gradient_does_not_depend_on_how_a_step_is_cut(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker, budget: int, chunk: int, order: list[int], method: Method
) -> None:
    batch = graded(make_batch(3, range(4), method, group_size=3, spans=[Span(0, 2)]))
    trainer = open_trainer(tied, method, lr=0.0, max_grad_norm=0.0, micro_batch_tokens=10_000)
    whole_step = gradients(trainer, batch)
    trainer.micro_batch_tokens, trainer.head_chunk = budget, chunk
    cut = gradients(trainer, msgspec.structs.replace(batch, items=[batch.items[i] for i in order]))
    assert any(gradient.abs().max() > 1e-4 for gradient in whole_step.values())
    for name, gradient in whole_step.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens_and_not_over_micro_batches(
    tied: Path, open_trainer: TrainerOpener, make_batch: BatchMaker
) -> None:
    batch = make_batch(0, range(6))
    trainer = open_trainer(tied, lr=0.0, micro_batch_tokens=10_000)
    together = trainer.train(batch).metrics["loss"]
    alone = [trainer.train(msgspec.structs.replace(batch, items=[item])) for item in batch.items]
    counts = [done.tokens_trained for done in alone]
    assert len(set(counts)) > 1
    assert together == pytest.approx(np.average([done.metrics["loss"] for done in alone], weights=counts), rel=1e-4)


# ---------------------------------------------------------------- 16, slot by slot
SHAPES: list[slots.Shape] = [
    Clip(1.0), DropBeyond(1.0), Floor(), SoftLog(), Sign(), Baseline(k=2), OutcomeGate(), MarginShift(), Return(0.9), OffPolicyShape(),
    Modulate(),
]
WEIGHTS: list[slots.Weight] = [
    Keep(), Keep(EntropyOrDivergence()), Keep(Teachability(), 0.5), Keep(LogRatio(), over="answer"), AtLeastFloor(), TeacherAccepts(),
    RelativeConfidence(), StepRatio(), ChangePoint(segment=1), RockTokens(), PassRate(), GroupSoftmax(), GroupSoftmax("student_surprise"),
]
WHENS: list[slots.When] = [
    TeacherEntropy(1.0), TeacherPrefers(), Trusted(), Correct(), Incorrect(), WrittenBy("teacher"), HighEntropy(0.5), Early(0.5),
    Horizon(3),
]
CORRECTIONS: list[slots.Correction] = [TruncatedRatio(), HardGate(), ClippedRatio(), SecondMomentBudget(), TeacherRatio()]
SINGLE = {
    **{type(shape).__name__: composed(gradient_of(Advantage(), shape=(shape,))) for shape in SHAPES},
    **{f"{type(w).__name__}{i}": composed(gradient_of(Advantage(), weight=(w,))) for i, w in enumerate(WEIGHTS)},
    **{type(when).__name__: composed(gradient_of(Advantage(), when=when)) for when in WHENS},
    **{type(c).__name__: composed(gradient_of(Advantage()), correction=c) for c in CORRECTIONS},
    "Extrapolate": composed(gradient_of(ReverseKL(), target=Extrapolate())),
    "exclusive": composed(gradient_of(ReverseKL(), when=TeacherPrefers()), gradient_of(Advantage()), routing="exclusive"),
}


class Asked(Mapping[str, Tensor]):
    """Facts of made-up tokens, and which of them anybody looked at."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns, self.names = columns, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


ROWS = np.repeat(np.arange(6), [1, 7, 4, 9, 3, 8])


def step(seed: int = 0) -> tuple[dict[str, Tensor], Known]:
    """Six answers of three groups with facts at random."""
    rng, count = np.random.default_rng(seed), len(ROWS)
    logs = {name: torch.tensor(-rng.exponential(size=count)) for name in ("logp", "logq", "logb")}
    above_zero = {
        name: torch.tensor(rng.exponential(size=count)) for name in ("entropy", "teacher_entropy", "divergence", "baseline", "margin")
    }
    others = {"log_ratio": rng.normal(size=count) * 0.3, "agreement": rng.uniform(size=count), "rank": rng.integers(0, 9, count) * 1.0}
    per_answer = {"correct": rng.integers(0, 2, 6) * 1.0, "pass_rate": rng.uniform(size=6), "advantage": rng.normal(size=6)}
    known = known_about(
        torch.tensor(rng.integers(0, 5, count)), row=ROWS, group=ROWS // 2,
        position=np.concatenate([np.arange(n) for n in np.bincount(ROWS)]),
        segment=np.concatenate([np.arange(n) // 3 for n in np.bincount(ROWS)]), author=(ROWS % 3 == 0).astype(int),
        uniform=rng.uniform(size=count), **{name: values[ROWS] for name, values in per_answer.items()},
    )
    return logs | above_zero | {name: torch.tensor(values) for name, values in others.items()}, known


def part_of(facts: Mapping[str, Tensor], known: Known, where: Tensor) -> tuple[dict[str, Tensor], Known]:
    return {name: column[where] for name, column in facts.items()}, known.at(where)


@pytest.mark.parametrize("name", SINGLE)
def test_a_slot_looks_at_nothing_that_its_method_does_not_ask_for(name: str) -> None:
    method, (facts, known) = SINGLE[name], step()
    asked = Asked(facts)
    instruct(asked, known, method.at(0.0))
    assert asked.names <= {"logp", "logq", "logb", "log_ratio", *method.facts}
    assert "logb" not in asked.names or method.needs_reference
    assert not asked.names & {"logq", "teacher_entropy", "divergence", "baseline", "agreement", "margin", "rank"} or method.needs_teacher


@pytest.mark.parametrize("name", [name for name, method in SINGLE.items() if not method.surveys])
def test_a_slot_that_does_not_survey_says_of_a_token_the_same_whatever_stands_beside_it(name: str) -> None:
    method, (facts, known) = SINGLE[name], step()
    together = instruct(facts, known, method.at(0.0))
    for at in range(len(ROWS)):
        alone = instruct(*part_of(facts, known, torch.tensor([at])), method.at(0.0))
        torch.testing.assert_close(alone[:, 0], together[:, at])


@pytest.mark.parametrize("name", SINGLE)
def test_a_slot_says_the_same_of_a_step_whose_answers_come_in_another_order(name: str) -> None:
    method, (facts, known) = SINGLE[name], step()
    order = torch.tensor([i for row in (4, 1, 5, 0, 3, 2) for i in np.flatnonzero(row == ROWS)])
    torch.testing.assert_close(instruct(*part_of(facts, known, order), method.at(0.0)), instruct(facts, known, method.at(0.0))[:, order])


@pytest.mark.parametrize("name", SINGLE)
def test_orders_are_finite_and_weights_keep_the_sign(name: str) -> None:
    method, (facts, known) = SINGLE[name], step(1)
    found = instruct(facts, known, method.at(0.0))
    assert torch.isfinite(found).all()
    if method.branches[0].weight or method.correction is not SINGLE["Clip"].correction:
        assert (found[0] * known.advantage >= 0).all()


def test_tokens_that_others_wrote_do_not_make_room_in_the_budget_of_the_students_own() -> None:
    facts = {"log_ratio": torch.tensor([0.1, 0.3, 0.0, 0.0, 0.0, 0.0])}
    known = known_about(torch.arange(6), author=[0, 0, 1, 1, 1, 1], advantage=[1.0] * 6)
    method = composed(gradient_of(Advantage()), correction=SecondMomentBudget(budget=0.04))  # of its own: (.01 + .09) / 2 = .05
    assert instruct(facts, known, method)[0].tolist() == pytest.approx([np.exp(0.1), 0, 1, 1, 1, 1])


# ---------------------------------------------------------------- what records say
def row_of(
    seq: int, index: int, length: int, *, fresh: Sequence[bool] | None = None, peers: Sequence[Rollout] = (), **values: object
) -> Row:
    rollout = answer(seq, index, length, **values)
    ages = np.zeros(length, np.int32)
    return Row(seq, rollout, [], list(peers) or [rollout], ages, np.ones(length, bool) if fresh is None else np.array(fresh))


def answer(seq: int, index: int, length: int, reward: float | None = None, correct: bool | None = None, **values: object) -> Rollout:
    ids = np.arange(length) + 10 * index
    return Rollout(
        id=f"p{seq}.{index}", prompt_ids=Array.of([1], "int32"), completion_ids=Array.of(ids, "int32"),
        logprobs=Array.of(-0.1 * (ids + 1), "float32"), weight_spans=[Span(0, 0)],
        outcome=None if reward is None else Outcome(reward, correct), **values,  # type: ignore[arg-type]
    )


NOTHING = composed(gradient_of(ReverseKL()))


def test_columns_stand_row_after_row_and_hold_the_fresh_tokens_alone() -> None:
    rows = [row_of(7, 0, 3, fresh=[False, True, True]), row_of(7, 1, 2), row_of(9, 2, 1, temperature=0.7)]
    known = known_of(rows, 0, NOTHING)
    assert known.row.tolist() == [0, 0, 1, 1, 2]
    assert known.group.tolist() == [7, 7, 7, 7, 9]
    assert known.position.tolist() == [1, 2, 0, 1, 0]
    assert known.ids.tolist() == [1, 2, 10, 11, 20]
    np.testing.assert_allclose(known.logmu, [-0.2, -0.3, -1.1, -1.2, -2.1], rtol=1e-6)
    np.testing.assert_allclose(known.temperature, [1, 1, 1, 1, 0.7])
    assert known.weight.tolist() == [1] * 5


def test_greedy_answers_have_log_probs_at_temperature_one() -> None:
    assert known_of([row_of(0, 0, 2, temperature=0.0)], 0, NOTHING).temperature.tolist() == [1, 1]


def test_every_token_has_its_author() -> None:
    mixed = [Author(0, "student"), Author(2, "teacher"), Author(3, "gold")]
    rows = [row_of(0, 0, 5, authors=mixed), row_of(0, 1, 2), row_of(0, 2, 2, authors=[Author(0, "teacher")])]
    assert known_of(rows, 0, NOTHING).author.tolist() == [0, 0, 1, 2, 2, 0, 0, 1, 1]


def test_every_token_lies_in_its_step_also_where_older_ones_are_masked() -> None:
    rows = [row_of(0, 0, 6, steps=[0, 2, 5]), row_of(0, 1, 2), row_of(0, 2, 4, steps=[0, 1], fresh=[False, False, True, True])]
    assert known_of(rows, 0, NOTHING).segment.tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 1, 1]


@given(st.integers(1, 12), st.data())
def test_authors_and_steps_agree_with_their_spans(length: int, data: st.DataObject) -> None:
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, length - 1))) if length > 1 else ())]
    who = [data.draw(st.sampled_from(["student", "teacher", "gold"])) for _ in starts]
    row = row_of(0, 0, length, authors=[Author(*author) for author in zip(starts, who, strict=True)], steps=starts)
    known = known_of([row], 0, NOTHING)
    for token in range(length):
        span = sum(start <= token for start in starts) - 1
        assert int(known.segment[token]) == span
        assert ("student", "teacher", "gold")[int(known.author[token])] == who[span]


def test_verdicts_and_pass_rates_are_those_of_the_whole_group_and_unknown_where_nobody_graded() -> None:
    group = [answer(4, i, 1, float(right), right) for i, right in enumerate((True, False, False, True, True))] + [answer(4, 5, 1)]
    rows = [row_of(4, 0, 1, reward=1.0, correct=True, peers=group), row_of(4, 1, 1, reward=0.0, correct=False, peers=group)]
    rows += [row_of(4, 5, 1, peers=group), row_of(5, 0, 1)]
    known = known_of(rows, 0, NOTHING)
    np.testing.assert_array_equal(known.correct, [1, 0, np.nan, np.nan])
    np.testing.assert_allclose(known.pass_rate, [0.6, 0.6, 0.6, np.nan])


@pytest.mark.parametrize(("kind", "expected"), [
    ("mean", (0.5, -0.5, 0.25, -0.25)), ("grpo", (1.264911, -1.264911, 0.632456, -0.632456)),
    ("rloo", (0.666667, -0.666667, 0.333333, -0.333333)),
])
def test_advantages_are_of_the_whole_group_though_some_of_it_is_not_trained(kind: str, expected: Sequence[float]) -> None:
    group = [answer(4, i, 2, reward) for i, reward in enumerate((1.0, 0.0, 0.75, 0.25))]
    rows = [row_of(4, i, 2, reward=group[i].outcome.reward, peers=group) for i in (3, 0)]  # type: ignore[union-attr]
    known = known_of(rows, 0, composed(gradient_of(Advantage(kind))))  # type: ignore[arg-type]
    np.testing.assert_allclose(known.advantage, np.repeat([expected[3], expected[0]], 2), atol=1e-5)


def test_an_answer_that_nobody_graded_has_no_advantage_and_takes_no_part_in_the_others() -> None:
    group = [answer(4, 0, 1, 1.0), answer(4, 1, 1, 0.0), answer(4, 2, 1)]
    rows = [row_of(4, i, 1, reward=r, peers=group) for i, r in ((0, 1.0), (1, 0.0), (2, None))]
    known = known_of(rows, 0, composed(gradient_of(Advantage("mean"))))
    assert known.advantage.tolist() == [0.5, -0.5, 0]


def test_advantages_are_of_each_group_alone() -> None:
    groups = [[answer(seq, i, 1, reward) for i, reward in enumerate(rewards)] for seq, rewards in enumerate(((1.0, 0.0), (5.0, 5.0)))]
    rows = [row_of(seq, i, 1, reward=g.outcome.reward, peers=group) for seq, group in enumerate(groups) for i, g in enumerate(group)]  # type: ignore[union-attr]
    assert known_of(rows, 0, composed(gradient_of(Advantage("mean")))).advantage.tolist() == [0.5, -0.5, 0, 0]


def test_two_kinds_of_advantage_in_one_method_are_both_given_or_refused() -> None:
    group = [answer(4, 0, 1, 1.0), answer(4, 1, 1, 0.0)]
    rows = [row_of(4, i, 1, reward=g.outcome.reward, peers=group) for i, g in enumerate(group)]  # type: ignore[union-attr]
    try:
        method = composed(gradient_of(Advantage("mean")), gradient_of(Advantage("rloo")))
    except ValueError:
        return
    found = instruct({"logp": torch.zeros(2)}, known_of(rows, 0, method), method)
    np.testing.assert_allclose(found, [[0.5, -0.5], [1.0, -1.0]])


def test_coins_are_a_tokens_own_at_its_step_whoever_stands_beside_it() -> None:
    method = composed(gradient_of(ReverseKL(), when=Trusted()))
    rows = [row_of(0, 0, 9), row_of(0, 1, 9, fresh=[False] * 4 + [True] * 5)]
    there, back, alone = (known_of(chosen, 3, method).uniform.tolist() for chosen in (rows, rows[::-1], rows[1:]))
    assert there == back[5:] + back[:5]
    assert alone == there[9:]
    assert known_of(rows, 4, method).uniform.tolist() != there
    assert len(set(there)) == 14
    assert all(0 <= coin < 1 for coin in there)


def test_every_answer_counts_the_same_when_answers_are_averaged() -> None:
    rows = [row_of(0, 0, 1), row_of(0, 1, 3, fresh=[False, True, True]), row_of(0, 2, 5)]
    weight = known_of(rows, 0, msgspec.structs.replace(NOTHING, reduce="answer_mean")).weight.numpy()
    totals = [weight[:1].sum(), weight[1:3].sum(), weight[3:].sum()]
    np.testing.assert_allclose(totals, 8 / 3, rtol=1e-6)
    assert weight.mean() == pytest.approx(1)


def test_averaged_answers_count_the_same_whatever_their_age() -> None:
    old = row_of(0, 0, 4)._replace(ages=np.array([9, 9, 1, 1], np.int32))
    rows = [old, row_of(0, 1, 2)]
    method = msgspec.structs.replace(NOTHING, reduce="answer_mean", age_weight=AgeDecay(half_life_steps=2.0))
    weight = known_of(rows, 9, method).weight.numpy()
    assert weight.mean() == pytest.approx(1)
    assert weight[:4].sum() == pytest.approx(weight[4:].sum(), rel=1e-5)


# ---------------------------------------------------------------- one name, one coefficient
def test_a_coefficient_is_of_the_named_divergence() -> None:
    logp, logq = torch.tensor(np.log(P)), torch.tensor(np.log(Q))
    np.testing.assert_allclose(coefficient(logp, logq, ReverseKL()), D)
    np.testing.assert_allclose(coefficient(logp, logq, ForwardKL()), Q / P - 1)


def test_a_whole_vocabulary_needs_no_ids() -> None:
    target = Target(torch.tensor([0]), torch.tensor(np.log(Q))[None])
    assert float(told(torch.tensor(np.log(P))[None], target, composed(Branch(support=FullVocabulary()))).loss) == pytest.approx(kl(P, Q))
