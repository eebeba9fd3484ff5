"""Micro-batches cover every row once, within the budget and at the least cost; token g is predicted one before it."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamopd.layout import MICRO_BATCH_COST, cut_micro_batches, pad_right, predicting_positions

LENGTHS = st.lists(st.integers(1, 400), max_size=40)


@given(LENGTHS, st.integers(1, 3000))
def test_every_row_is_in_one_micro_batch_and_none_is_over_budget_but_a_row_alone(lengths: list[int], budget: int) -> None:
    cuts = cut_micro_batches(lengths, budget)
    assert sorted(i for cut in cuts for i in cut) == list(range(len(lengths)))
    assert all(len(cut) == 1 or len(cut) * max(lengths[i] for i in cut) <= budget for cut in cuts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.integers(400, 3000))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths: list[int], budget: int) -> None:
    def cost(cuts: list[list[int]]) -> float:
        return sum(len(cut) * max(cut) + MICRO_BATCH_COST if len(cut) * max(cut) <= budget else np.inf for cut in cuts)

    ordered = sorted(lengths)
    every = [
        [ordered[a:b] for a, b in pairwise([0, *(i + 1 for i, cut in enumerate(bits) if cut), len(ordered)])]
        for bits in product([False, True], repeat=len(ordered) - 1)
    ]
    found = [[lengths[i] for i in cut] for cut in cut_micro_batches(lengths, budget)]
    assert cost(found) == min(cost(cuts) for cuts in every)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_each_answer_token_is_predicted_by_the_token_before_it(rows: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 1000, p).astype(np.int32) for p, _ in rows]
    answers = [rng.integers(1, 1000, g).astype(np.int32) for _, g in rows]
    padded = pad_right([np.concatenate(pair) for pair in zip(prompts, answers, strict=True)], 0)
    where = predicting_positions([p for p, _ in rows], [g for _, g in rows], padded.shape[1])
    assert padded.ravel()[where + 1].tolist() == [int(token) for answer in answers for token in answer] or not len(where)
    before = [token for p, a in zip(prompts, answers, strict=True) for token in [*p[-1:], *a[:-1]] if len(a)]
    assert padded.ravel()[where].tolist() == before
