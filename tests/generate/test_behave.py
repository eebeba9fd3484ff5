"""Behaviours as arithmetic: the cards' own numbers, brute force, and what must be equal to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamopd.generate.behave import draw, geometric_blend, interleave, kernel_of, kl, mixture, spikes
from streamopd.generate.kernel import invert_cdf, kernel_logp
from streamopd.slots import Coin, GeometricBlend, Interleave, Mixture, OnPolicy, SwitchAtSpike

P = torch.tensor([[0.6, 0.3, 0.1]]).log()  # core.md 0.1
Q = torch.tensor([[0.2, 0.5, 0.3]]).log()
seeds = st.integers(0, 10_000)


def pair(seed: int, rows: int = 6, vocabulary: int = 11, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two random kernels, far from each other; the first cut by top-p."""
    noise = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(rows, vocabulary, generator=noise) for _ in range(2))
    return kernel_logp(p, 1.0, top_p), kernel_logp(q, 1.0, 1.0)


def luck(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(rows, generator=noise), torch.rand(rows, generator=noise)


NOBODY = torch.zeros(6, dtype=torch.bool)


# ---------------------------------------------------------------- TRB's blend
def test_a_blend_within_no_distance_is_the_student() -> None:
    beta, mu = geometric_blend(P, Q, 0.0)
    assert beta.tolist() == [0]
    assert torch.equal(mu, P)


@pytest.mark.parametrize("epsilon", [0.36528, 1.0, 50.0])
def test_a_blend_within_the_whole_distance_is_the_teacher(epsilon: float) -> None:
    assert float(kl(Q, P)) == pytest.approx(0.36527, abs=1e-5)
    beta, mu = geometric_blend(P, Q, epsilon)
    assert beta.tolist() == [1]
    torch.testing.assert_close(mu, Q)


def test_a_blend_in_between_is_the_cards_numbers() -> None:
    beta, mu = geometric_blend(P, Q, 0.05)
    assert float(beta) == pytest.approx(0.35015, abs=2e-5)
    np.testing.assert_allclose(mu.exp()[0], [0.44679, 0.39248, 0.16072], atol=2e-5)
    assert float(kl(mu, P)) == pytest.approx(0.05, abs=1e-5)


@given(seeds, st.sampled_from([1e-6, 0.01, 0.3, 3.0, 30.0]), st.sampled_from([1.0, 0.7]))
def test_a_blend_stays_within_its_distance_inside_the_nucleus_and_no_nearer_than_it_must(seed: int, epsilon: float, top_p: float) -> None:
    p, q = pair(seed, top_p=top_p)
    beta, mu = geometric_blend(p, q, epsilon)
    distance = kl(mu.double(), p.double())
    assert (distance <= epsilon + 1e-5).all()
    assert ((beta == 1) | (distance >= 0.9 * epsilon - 1e-6)).all()
    np.testing.assert_allclose(mu.exp().sum(-1), 1, atol=1e-5)
    assert (mu.exp()[p == -torch.inf] == 0).all()


# ---------------------------------------------------------------- MiniLLM's mixture
@given(seeds, st.floats(0, 1), st.sampled_from([1.0, 0.7]))
def test_a_mixture_is_the_sum_of_both(seed: int, alpha: float, top_p: float) -> None:
    p, q = pair(seed, top_p=top_p)
    expected = alpha * q.double().exp() + (1 - alpha) * p.double().exp()
    np.testing.assert_allclose(mixture(p, q, alpha).double().exp(), expected, atol=1e-6)


def test_a_blends_tokens_are_drawn_from_it_and_are_the_students() -> None:
    (p, q), (uniform, second) = pair(3), luck(3, 6)
    for behaviour, mu in ((Mixture(alpha=0.4), mixture(p, q, 0.4)), (GeometricBlend(epsilon=0.1), geometric_blend(p, q, 0.1)[1])):
        drawn = draw(behaviour, p, q, NOBODY, uniform, second)
        assert drawn.ids_B.tolist() == invert_cdf(mu.exp(), uniform).tolist()
        assert torch.equal(drawn.logp_B, mu.gather(-1, drawn.ids_B[:, None]).squeeze(-1))
        assert not drawn.by_teacher_B.any()


# ---------------------------------------------------------------- speculative KD
@given(seeds, st.sampled_from([1.0, 0.7]), st.sampled_from([11, 12, 1000]))
def test_interleaving_over_the_whole_vocabulary_is_on_policy_to_the_bit(seed: int, top_p: float, k: int) -> None:
    (p, q), (uniform, second) = pair(seed, top_p=top_p), luck(seed, 6)
    alone = draw(OnPolicy(), p, q, NOBODY, uniform, second)
    drawn = draw(Interleave(k=k), p, q, NOBODY, uniform, second)
    assert torch.equal(drawn.ids_B, alone.ids_B)
    assert torch.equal(drawn.logp_B, alone.logp_B)
    assert not drawn.by_teacher_B.any()


@given(seeds, st.integers(0, 4), st.sampled_from([1.0, 0.7]))
def test_what_is_replaced_lay_outside_the_teachers_top_k_and_what_is_kept_inside(seed: int, k: int, top_p: float) -> None:
    (p, q), (uniform, second) = pair(seed, top_p=top_p), luck(seed, 6)
    drawn = interleave(p, q, k, uniform, second)
    proposed, other = invert_cdf(p.exp(), uniform), invert_cdf(q.exp(), second)
    for row in range(6):
        likely = set(q[row].argsort(descending=True)[:k].tolist())
        replaced = bool(drawn.by_teacher_B[row])
        assert replaced == (int(proposed[row]) not in likely)
        assert drawn.ids_B[row] == (other if replaced else proposed)[row]
        mu = torch.tensor([v in likely for v in range(11)]) * p[row].double().exp()
        mu += (1 - mu.sum()) * q[row].double().exp()
        assert float(drawn.logp_B[row]) == pytest.approx(float(mu[drawn.ids_B[row]].log()), abs=1e-4)


# ---------------------------------------------------------------- taking turns
def test_whoever_was_handed_the_row_writes_it() -> None:
    (p, q), (uniform, second) = pair(1), luck(1, 6)
    handed = torch.tensor([True, False, True, False, False, True])
    drawn = draw(SwitchAtSpike(), p, q, handed, uniform, second)
    for row, theirs in enumerate(handed.tolist()):
        kernel = (q if theirs else p)[row : row + 1]
        assert drawn.ids_B[row] == invert_cdf(kernel.exp(), uniform[row : row + 1])[0]
        assert drawn.logp_B[row] == kernel[0, drawn.ids_B[row]]
    assert torch.equal(drawn.by_teacher_B, handed)


def test_a_spike_is_told_against_a_whole_window() -> None:
    assert spikes(3.1, [1.0, 1.0], factor=3.0, window=2)
    assert not spikes(3.0, [1.0, 1.0], factor=3.0, window=2), "it must exceed"
    assert not spikes(99.0, [1.0], factor=3.0, window=2), "one token is no window"
    assert not spikes(0.0, [0.0, 0.0], factor=3.0, window=2)


def test_a_greedy_answer_of_the_teacher_is_its_likeliest_and_says_temperature_0() -> None:
    (p, q), (uniform, second) = pair(2), luck(2, 6)
    drawn = draw(Coin(student=0.0, greedy=True), p, q, ~NOBODY, uniform, second)
    assert drawn.ids_B.tolist() == q.argmax(-1).tolist()
    assert torch.equal(drawn.logp_B, q.max(-1).values)
    assert kernel_of(Coin(student=0.0, greedy=True), 0.8, 0.9) == (0.0, 1.0)
    assert kernel_of(Coin(student=0.0), 0.8, 0.9) == (0.8, 1.0)
    assert kernel_of(Mixture(), 0.8, 0.9) == (0.8, 0.9)
