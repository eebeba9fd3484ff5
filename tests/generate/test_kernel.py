"""The kernel against float64 brute force, and draws against the distribution they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamopd.generate.draws import uniforms
from streamopd.generate.kernel import HEAD, invert_cdf, kernel_logp, sample, top_k


def brute_force(logits: NDArray[np.float64], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Probabilities of one row, id by id in order of probability."""
    scaled = np.exp((logits - logits.max()) / temperature)
    probs = scaled / scaled.sum()
    kept, mass = set(), 0.0
    for v in sorted(range(len(probs)), key=lambda v: -probs[v]):
        if mass >= top_p:
            break
        kept.add(v)
        mass += probs[v]
    inside = np.array([p if v in kept else 0.0 for v, p in enumerate(probs)])
    return inside / inside.sum()


def clear_of_the_border(probs: NDArray[np.float64], top_p: float) -> bool:
    """No partial sum within rounding of top_p, and no two probabilities nearly equal."""
    ordered = np.sort(probs)[::-1]
    return bool(np.abs(ordered.cumsum() - top_p).min() > 1e-4 and np.abs(np.diff(ordered)).min() > 1e-6)


def test_a_flat_row_beside_a_peaked_one_in_a_large_vocabulary_gets_its_whole_nucleus() -> None:
    logits = torch.randn(2, 5 * HEAD, generator=torch.Generator().manual_seed(2)) * torch.tensor([[0.1], [4.0]])
    got = kernel_logp(logits, 1.0, 0.9).double().exp().numpy()
    for row, expected in enumerate(brute_force(line.double().numpy(), 1.0, 0.9) for line in logits):
        np.testing.assert_allclose(got[row], expected, atol=1e-6)
    assert (got[0] > 0).sum() > HEAD > (got[1] > 0).sum()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_says_so_and_spares_the_others(top_p: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [9.0, 0.0, 0.0]])
    ids, logp = sample(logits, torch.tensor([0.5, 0.5]), temperature, top_p)
    assert torch.isfinite(logp).tolist() == [False, True]
    assert ids[1] == 0
    assert 0 <= ids[0] < 3


rows = st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=24)


@given(rows, st.sampled_from([0.3, 0.7, 1.0, 1.7]), st.sampled_from([0.2, 0.5, 0.9, 0.99, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_kernel_is_the_renormalised_nucleus(row: list[float], temperature: float, top_p: float) -> None:
    logits = np.asarray(row, np.float64)
    assume(top_p == 1 or clear_of_the_border(brute_force(logits, temperature, 1.0), top_p))
    expected = brute_force(logits, temperature, top_p)
    got = kernel_logp(torch.tensor([row]), temperature, top_p)[0].double().exp().numpy()
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert ((got == 0) == (expected == 0)).all() or top_p == 1


@given(rows, st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0.4, 1.0]))
@settings(max_examples=150, deadline=None)
def test_a_draw_is_the_inverse_of_the_cdf_and_its_log_prob_is_the_kernels(row: list[float], u: float, top_p: float) -> None:
    logits = torch.tensor([row])
    logp = kernel_logp(logits, 1.0, top_p)
    ids, drawn = sample(logits, torch.tensor([u]), 1.0, top_p)
    cdf = np.concatenate([[0.0], logp[0].double().exp().cumsum(0).numpy()])
    v = int(ids)
    assert cdf[v] - 1e-6 <= u * cdf[-1] <= cdf[v + 1] + 1e-6
    assert logp[0, v] > -torch.inf
    assert float(drawn) == float(logp[0, v])


def test_an_id_of_probability_zero_is_never_drawn() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    ids = invert_cdf(probs, torch.tensor([0.0, 0.2499999, 0.25, 0.75, 0.99999994]))
    assert ids.tolist() == [1, 1, 3, 3, 3]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_the_largest_draw_falls_on_the_last_id_that_has_any_probability(weights: list[int], zeros: int) -> None:
    probs = torch.tensor([weights + [0] * zeros]) / sum(weights)
    (v,) = invert_cdf(probs, torch.tensor([1 - 2**-24])).tolist()
    assert probs[0, v] > 0


def test_greedy_takes_the_mode_and_reports_it_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    ids, logp = sample(logits, torch.tensor([0.99]), 0.0, 0.5)
    assert ids.tolist() == [1]
    assert float(logp) == pytest.approx(2 - np.log(1 + np.e + np.e**2))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.85)])
def test_many_draws_follow_the_kernel(temperature: float, top_p: float) -> None:
    logits = torch.randn(1, 19, generator=torch.Generator().manual_seed(1)) * 2
    count = 20_000
    u = torch.from_numpy(uniforms((3, 1, 4), count))
    ids, _ = sample(logits.expand(count, -1), u, temperature, top_p)
    expected = brute_force(logits[0].double().numpy(), temperature, top_p) * count
    seen = np.bincount(ids.numpy(), minlength=19)
    assert seen[expected == 0].sum() == 0
    enough = expected > 5
    chi_square = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert chi_square < enough.sum() + 4 * np.sqrt(2 * enough.sum())  # four deviations above its mean


def test_top_k_is_sorted_and_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    ids, logp = top_k(logits, 3)
    assert ids.tolist() == [[1, 2, 0]]
    assert ids.dtype == torch.int32
    np.testing.assert_allclose(logp[0], logits.log_softmax(-1)[0, ids[0].long()], atol=2e-3)
    assert top_k(logits, 99)[0].shape == (1, 4)


def test_uniforms_are_a_pure_function_of_the_seed_and_longer_ones_begin_alike() -> None:
    assert (uniforms((1, 2), 40)[:10] == uniforms((1, 2), 10)).all()
    assert (uniforms((1, 2), 40) != uniforms((2, 1), 40)).any()
    assert 0 <= uniforms((0,), 10_000).min() < uniforms((0,), 10_000).max() < 1
