"""Ages are counted at the step that trains, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from streamopd.errors import GarbageRecord
from streamopd.learn.freshness import age_weights, fresh_mask, keep_answer, token_ages
from streamopd.schemas import Span
from streamopd.slots import AgeDecay, NoAgeWeight


def test_a_token_is_as_old_as_the_steps_since_its_span_was_written() -> None:
    assert token_ages([Span(0, 3), Span(2, 5)], 5, 7).tolist() == [4, 4, 2, 2, 2]


def test_a_token_written_by_weights_that_do_not_exist_yet_is_refused_with_both_numbers() -> None:
    with pytest.raises(GarbageRecord, match="weights 9 came to step 7"):
        token_ages([Span(0, 3), Span(2, 9)], 5, 7)


def test_an_answer_is_kept_while_at_least_half_of_it_is_fresh() -> None:
    ages = np.array([5, 5, 1, 1], np.int32)
    assert fresh_mask(ages, 4).tolist() == [False, False, True, True]
    assert keep_answer(fresh_mask(ages, 4))
    assert not keep_answer(fresh_mask(np.array([5, 5, 1], np.int32), 4))
    assert not keep_answer(np.zeros(0, bool))


def test_age_weights_halve_with_the_half_life_and_have_mean_one() -> None:
    weights = age_weights(np.array([0, 4, 8], np.int32), AgeDecay(half_life_steps=4))
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights / weights[0], [1, 0.5, 0.25], rtol=1e-6)


def test_tokens_of_one_age_all_weigh_one_however_old_they_are() -> None:
    np.testing.assert_array_equal(age_weights(np.full(3, 100_000, np.int32), AgeDecay(half_life_steps=1)), 1)
    np.testing.assert_array_equal(age_weights(np.array([0, 50], np.int32), NoAgeWeight()), 1)
