"""The objective against float64 brute force that shares no code with it, and against the published numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamopd.learn.objective import Target, overlap
from streamopd.slots import JSD, Branch, ForwardKL, FullVocabulary, Loss, Method, ReverseKL, Union

from .positions import look_at, told

P, Q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
DIVERGENCES = [ReverseKL(), ForwardKL(), JSD(0.5), JSD(0.1), JSD(0.0), JSD(1.0)]
NO_SAMPLE = torch.zeros(1, dtype=torch.long)


def method_of(support: FullVocabulary | Union, divergence: Loss) -> Method:
    return Method(name="m", summary="", branches=(Branch(support=support, loss=divergence),))


def value_and_gradient(
    method: Method, p: NDArray[np.float64], q: NDArray[np.float64], ids: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
) -> tuple[float, NDArray[np.float64]]:
    """Loss of one token and its gradient in the student's logits, which are log p."""
    logits = torch.tensor(np.log(p))[None].requires_grad_()
    chosen = torch.arange(len(q)) if ids is None else torch.tensor(list(ids))
    support = torch.tensor(np.log(q))[chosen][None]
    stop = torch.tensor([np.log(q[list(stop_ids)].sum())]) if stop_ids else None
    target = Target(NO_SAMPLE, support, None if ids is None else chosen[None], None, stop)
    loss = told(logits, target, method, stop_ids).loss
    loss.sum().backward()
    return float(loss.detach()), logits.grad.numpy()[0]


# ---------------------------------------------------------------- published numbers
@pytest.mark.parametrize(("divergence", "value", "gradient"), [
    (ReverseKL(), 0.396058, (0.42153, -0.27207, -0.14947)),
    (ForwardKL(), 0.365274, (0.4, -0.2, -0.2)),
    (JSD(0.5), 0.091121, (0.09534, -0.05630, -0.03904)),
    (JSD(0.0), 0.365274, (0.4, -0.2, -0.2)),
    (JSD(1.0), 0.396058, (0.42153, -0.27207, -0.14947)),
])
def test_whole_vocabulary_divergences_have_the_published_values_and_gradients(
    divergence: Loss, value: float, gradient: tuple[float, ...]
) -> None:
    found, slope = value_and_gradient(method_of(FullVocabulary(), divergence), P, Q)
    assert found == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(slope, gradient, atol=1e-5)


@pytest.mark.parametrize(("remainder", "ids", "value", "gradient"), [
    ("drop", (0, 1), 0.505920, (0.41562, -0.27502, -0.14059)),
    ("renorm", (0, 1), 0.310819, (0.35765, -0.35765, 0.0)),
    ("tail", (0, 1), 0.396058, (0.42153, -0.27207, -0.14947)),
    ("renorm", (1, 2), 0.035375, (0.0, 0.11021, -0.11021)),
])
def test_top_two_reverse_kl_has_the_published_values_and_gradients(
    remainder: str, ids: tuple[int, ...], value: float, gradient: tuple[float, ...]
) -> None:
    found, slope = value_and_gradient(method_of(Union(remainder=remainder), ReverseKL()), P, Q, ids)
    assert found == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(slope, gradient, atol=1e-5)


def test_a_small_beta_is_forward_kl_over_beta_and_a_large_one_reverse() -> None:
    near_forward, _ = value_and_gradient(method_of(FullVocabulary(), JSD(1e-4)), P, Q)
    near_reverse, _ = value_and_gradient(method_of(FullVocabulary(), JSD(1 - 1e-4)), P, Q)
    assert near_forward / 1e-4 == pytest.approx(0.36523, abs=1e-5)
    assert near_reverse / 1e-4 == pytest.approx(0.39601, abs=1e-5)


def test_half_jsd_is_symmetric_and_bounded_by_log_two() -> None:
    there, _ = value_and_gradient(method_of(FullVocabulary(), JSD(0.5)), P, Q)
    back, _ = value_and_gradient(method_of(FullVocabulary(), JSD(0.5)), Q, P)
    far, _ = value_and_gradient(method_of(FullVocabulary(), JSD(0.5)), np.array([1 - 1e-9, 1e-9]), np.array([1e-9, 1 - 1e-9]))
    assert there == pytest.approx(back)
    assert far <= np.log(2) + 1e-9
    assert far > 0.69


@pytest.mark.parametrize("support", [FullVocabulary(), Union()])
def test_stopping_by_another_stop_id_is_no_disagreement(support: FullVocabulary | Union) -> None:
    student, teacher = np.array([0.3, 0.7 - 1e-12, 1e-12]), np.array([0.3, 1e-12, 0.7 - 1e-12])
    ids = None if isinstance(support, FullVocabulary) else (0, 1, 2)
    apart, _ = value_and_gradient(method_of(support, ReverseKL()), student, teacher, ids)
    together, slope = value_and_gradient(method_of(support, ReverseKL()), student, teacher, ids, stop_ids=(1, 2))
    assert apart > 10
    assert together == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_a_tail_bucket_grows_with_the_support_up_to_the_exact_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(30))
    bounds = [value_and_gradient(method_of(Union(), ReverseKL()), p, q, range(k))[0] for k in range(1, 31)]
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-9)


# ---------------------------------------------------------------- brute force
class Case(NamedTuple):
    """One position: both distributions, a support, stop ids."""

    logits: NDArray[np.float64]
    q: NDArray[np.float64]
    ids: list[int]
    stop_ids: list[int]


@st.composite
def cases(draw: st.DrawFn, rows: int = 3) -> list[Case]:
    """A chunk: one vocabulary and stop set, ragged supports that may hold the whole vocabulary or nothing."""
    vocab = draw(st.integers(3, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stop_ids = draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=2))
    found = []
    for _ in range(rows):
        ids = draw(st.lists(st.integers(0, vocab - 1), unique=True, max_size=vocab))
        held = sorted({*ids, *stop_ids}) if draw(st.booleans()) else ids
        q = rng.dirichlet(np.ones(vocab)) * (1 - 1e-3) + 1e-3 / vocab
        found.append(Case(rng.normal(size=vocab) * 2, q, held, stop_ids))
    return found


def to_target(chunk: Sequence[Case], with_mass: bool) -> Target:
    width = max(len(case.ids) for case in chunk)
    ids = np.array([case.ids + [-1] * (width - len(case.ids)) for case in chunk], np.int64).reshape(len(chunk), width)
    support = np.array([[np.log(case.q[v]) for v in case.ids] + [-np.inf] * (width - len(case.ids)) for case in chunk])
    mass = torch.tensor([case.q[case.ids].sum() for case in chunk]) if with_mass else None
    stop = torch.tensor([np.log(case.q[case.stop_ids].sum()) for case in chunk]) if chunk[0].stop_ids else None
    sampled = torch.zeros(len(chunk), dtype=torch.long)
    return Target(sampled, torch.tensor(support).reshape(len(chunk), width), torch.tensor(ids), mass, stop)


def cells_of(case: Case) -> tuple[list[set[int]], set[int]]:
    """The partition as sets: single ids, stop ids together when there are several; and the rest."""
    stops = set(case.stop_ids) if len(case.stop_ids) > 1 else set()
    cells = [{v} for v in case.ids if v not in stops] + ([stops] if stops else [])
    return cells, set(range(len(case.q))) - set().union(*cells)


def brute(case: Case, logits: NDArray[np.float64], remainder: str, divergence: Loss) -> float:
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    cells, rest = cells_of(case)
    if remainder == "tail" and rest:
        cells = [*cells, rest]
    a, b = (np.array([x[list(cell)].sum() for cell in cells]) for x in (p, case.q))
    if remainder == "renorm" and cells:
        a, b = a / a.sum(), b / b.sum()
    return float(brute_divergence(a, b, divergence))


def brute_divergence(a: NDArray[np.float64], b: NDArray[np.float64], divergence: Loss) -> float:
    reverse, forward = (a * np.log(a / b)).sum(), (b * np.log(b / a)).sum()
    if isinstance(divergence, ReverseKL):
        return reverse
    if isinstance(divergence, ForwardKL):
        return forward
    if divergence.beta in (0, 1):
        return reverse if divergence.beta else forward
    m = divergence.beta * b + (1 - divergence.beta) * a
    return divergence.beta * (b * np.log(b / m)).sum() + (1 - divergence.beta) * (a * np.log(a / m)).sum()


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["tail", "renorm", "drop"]), st.sampled_from(DIVERGENCES), st.booleans())
def test_any_partition_gives_the_brute_force_value_and_slope(
    chunk: list[Case], remainder: str, divergence: Loss, with_mass: bool
) -> None:
    logits = torch.tensor(np.stack([case.logits for case in chunk])).requires_grad_()
    verdict = told(logits, to_target(chunk, with_mass), method_of(Union(remainder=remainder), divergence), chunk[0].stop_ids)
    verdict.loss.sum().backward()
    for row, case in enumerate(chunk):
        assert float(verdict.loss[row].detach()) == pytest.approx(brute(case, case.logits, remainder, divergence), abs=1e-6)
        step = np.eye(len(case.q)) * 1e-5
        slope = [
            (brute(case, case.logits + d, remainder, divergence) - brute(case, case.logits - d, remainder, divergence)) / 2e-5
            for d in step
        ]
        np.testing.assert_allclose(logits.grad[row].numpy(), slope, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(DIVERGENCES[:3]))
def test_a_tail_bucket_never_exceeds_the_exact_divergence(chunk: list[Case], divergence: Loss) -> None:
    logits = torch.tensor(np.stack([case.logits for case in chunk]))
    bound = told(logits, to_target(chunk, True), method_of(Union(), divergence), chunk[0].stop_ids).loss
    whole = Target(torch.zeros(len(chunk), dtype=torch.long), torch.tensor(np.log(np.stack([case.q for case in chunk]))))
    assert (bound <= told(logits, whole, method_of(FullVocabulary(), divergence), ()).loss + 1e-7).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_as_a_support_is_the_exact_divergence_with_its_gradient(divergence: Loss) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(5, 40, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    q = torch.randn(5, 40, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    ids = torch.stack([torch.randperm(40, generator=generator) for _ in range(5)])
    sampled = torch.zeros(5, dtype=torch.long)
    gradients, values = [], []
    as_support = Target(sampled, q.gather(1, ids), ids, torch.ones(5))
    for target, support in [(Target(sampled, q), FullVocabulary()), (as_support, Union())]:
        loss = told(logits, target, method_of(support, divergence), (3,)).loss
        gradients.append(torch.autograd.grad(loss.sum(), logits)[0])
        values.append(loss.detach())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["tail", "renorm", "drop"]), st.sampled_from(DIVERGENCES), st.floats(1, 300))
def test_values_and_gradients_stay_finite_on_rounded_and_extreme_evidence(
    seed: int, remainder: str, divergence: Loss, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(4, 12)) * scale, dtype=torch.float32).requires_grad_()
    ids = np.stack([rng.permutation(12)[:8] for _ in range(4)])
    ids[0, 5:], ids[1, :] = -1, np.r_[np.arange(8)]
    q = np.clip(rng.normal(size=(4, 8)) * scale, None, 0).astype(np.float16)
    support = torch.tensor(np.where(ids >= 0, q, -np.inf).astype(np.float32))
    mass, stop = torch.tensor([1.0009, 1.0, 0.999, 0.0]), torch.full((4,), -20.0)
    target = Target(torch.zeros(4, dtype=torch.long), support, torch.tensor(ids), mass, stop)
    verdict = told(logits, target, method_of(Union(remainder=remainder), divergence), (1, 2))
    verdict.loss.sum().backward()
    assert all(torch.isfinite(column).all() for column in verdict if column is not None)
    assert torch.isfinite(logits.grad).all()


def test_padding_columns_change_neither_value_nor_gradient() -> None:
    plain, slope = value_and_gradient(method_of(Union(), ReverseKL()), P, Q, (0, 1))
    logits = torch.tensor(np.log(P))[None].requires_grad_()
    padded = Target(NO_SAMPLE, torch.tensor([[-np.inf, np.log(0.2), -np.inf, np.log(0.5)]]), torch.tensor([[-1, 0, -1, 1]]))
    loss = told(logits, padded, method_of(Union(), ReverseKL()), ()).loss
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(plain)
    np.testing.assert_allclose(logits.grad.numpy()[0], slope, atol=1e-9)


# ---------------------------------------------------------------- monitors
def test_monitors_say_what_the_whole_distributions_say() -> None:
    support, stop = torch.tensor(np.log(Q[:2]))[None], torch.tensor([np.log(0.3)])
    target = Target(torch.tensor([1]), support, torch.tensor([[0, 1]]), torch.tensor([0.7]), stop)
    verdict = told(torch.tensor(np.log(P))[None], target, method_of(Union(), ForwardKL()), (2,))
    assert float(verdict.kl) == pytest.approx(0.396058, abs=1e-6), "the monitor is KL(p‖q), whatever the loss is"
    assert float(verdict.loss) == pytest.approx(0.365274, abs=1e-6)
    assert float(verdict.logp) == pytest.approx(np.log(0.3))
    assert float(verdict.entropy) == pytest.approx(0.89795, abs=1e-5)
    assert float(verdict.student_mass) == pytest.approx(0.9)
    assert float(verdict.teacher_mass) == pytest.approx(0.7)
    assert float(verdict.stop_logp) == pytest.approx(np.log(0.1))


def test_overlap_counts_ids_in_both_top_ks() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0, 1.0], [5.0, 4.0, 0.0, 1.0]])
    target = Target(NO_SAMPLE, torch.tensor([[-0.1, -3.0, -2.0], [-0.1, -0.5, -3.0]]), torch.tensor([[2, 1, 0], [1, 0, -1]]))
    assert overlap(look_at(logits, target), 2, 1).tolist() == [0.5, 1.0]


def test_a_vocabulary_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="speaks of 4 ids, the student of 3"):
        told(torch.zeros(1, 3), Target(NO_SAMPLE, torch.zeros(1, 4)), method_of(FullVocabulary(), ReverseKL()), ())
