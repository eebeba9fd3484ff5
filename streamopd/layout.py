"""How ragged answers lie in rectangles: length-sorted micro-batches, right padding, and the index law. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MICRO_BATCH_COST = 128  # padded tokens that one more forward costs on a small model; large models barely feel it


def cut_micro_batches(lengths: Sequence[int], token_budget: int) -> list[NDArray[np.intp]]:
    """Indices of each micro-batch, short rows first: the cuts that pad least, each within `token_budget` padded tokens.

    A row longer than the budget is alone in its micro-batch. A pure function of the lengths.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    ordered = np.asarray(lengths)[order]
    cheapest, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.intp)
    for end in range(1, len(order) + 1):
        padded = np.arange(end, 0, -1) * ordered[end - 1]  # of rows [start, end), for every start
        padded = np.where((padded <= token_budget) | (np.arange(end) == end - 1), padded, np.inf)
        costs = cheapest[:end] + padded + MICRO_BATCH_COST
        begins[end] = costs.argmin()
        cheapest[end] = costs[begins[end]]
    cuts, end = [], len(order)
    while end:
        cuts.append(order[begins[end] : end])
        end = int(begins[end])
    return cuts[::-1]


def pad_right(rows: Sequence[NDArray[np.int32]], pad_id: int) -> NDArray[np.int64]:
    """[R, L] the rows, padded behind. Causal attention needs no mask then: no token sees what lies after it."""
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), pad_id, np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return padded


def predicting_positions(prompt_lengths: Sequence[int], completion_lengths: Sequence[int], width: int) -> NDArray[np.int64]:
    """The index law: completion token g of row r is predicted at position P - 1 + g. Flat indices into [R · width]."""
    prompts, answers = np.asarray(prompt_lengths), np.asarray(completion_lengths)
    first = np.arange(len(prompts)) * width + prompts - 1
    within = np.arange(answers.sum()) - np.repeat(np.cumsum(answers) - answers, answers)
    return np.repeat(first, answers) + within
