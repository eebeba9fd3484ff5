"""Quantiles of steps of any size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from streamopd.learn.objective.quantile import quantile, reaches


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_it_is_that_of_torch(values: list[float], fraction: float) -> None:
    values_T = torch.tensor(values)
    torch.testing.assert_close(quantile(values_T, fraction), values_T.quantile(fraction))


def test_a_step_may_have_more_tokens_than_torch_takes() -> None:
    many = (1 << 24) + 1
    assert quantile(torch.arange(many, dtype=torch.float32), 0.5) == 1 << 23


def test_what_only_rounding_parts_from_the_border_reaches_it_and_small_scores_still_differ() -> None:
    assert reaches(torch.tensor([1.0, 1 - 1e-6, 0.999]), torch.tensor(1.0)).tolist() == [True, True, False]
    assert reaches(torch.tensor([1e-6, 2e-6, 3e-6, 0.0]), torch.tensor(2e-6)).tolist() == [False, True, True, False]
