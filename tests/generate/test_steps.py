"""The steps of an answer cover it, and each but the last ends with the delimiter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamopd.assets import resolve
from streamopd.errors import UserError
from streamopd.generate.steps import delimiter_ids, step_starts, with_steps
from streamopd.prompts.tokenizer import Tokenizer
from tests.pack.test_filters import answer, make_scored

PIECES = ["a", "b.", ". c", "\n", ".\n\n", ""]


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(("delimiter", "expected"), [("", set()), (".", {1, 2, 4}), ("\n", {3, 4}), ("\n\n", {4}), ("b", {1})])
def test_a_delimiter_is_any_token_whose_text_contains_it(delimiter: str, expected: set[int]) -> None:
    assert delimiter_ids(delimiter, decode, len(PIECES)) == expected


def test_a_delimiter_that_no_token_contains_is_refused_with_both() -> None:
    with pytest.raises(UserError, match=r"step_delimiter is 'a\.', and none of the student's 6 tokens"):
        delimiter_ids("a.", decode, len(PIECES))


@pytest.mark.parametrize(("ids", "starts"), [
    ([], []), ([0], []), ([3], []), ([0, 0, 0], []), ([0, 0, 3], []),
    ([0, 3, 0], [0, 2]), ([3, 0], [0, 1]), ([3, 3, 0, 4, 0, 0], [0, 1, 2, 4]),
])
def test_a_step_begins_after_a_delimiter_and_never_after_the_last_token(ids: list[int], starts: list[int]) -> None:
    assert step_starts(ids, frozenset({3, 4})) == starts


@given(st.lists(st.integers(0, 5), max_size=20), st.frozensets(st.integers(0, 5)))
def test_steps_cover_the_answer_and_hold_a_delimiter_at_their_end_only(ids: list[int], delimiters: frozenset[int]) -> None:
    starts = step_starts(ids, delimiters) or [0]
    steps = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [token for step in steps for token in step] == ids
    for step in steps:
        assert not any(token in delimiters for token in step[:-1])
    assert all(step[-1] in delimiters for step in steps[:-1])


def test_a_rollout_gets_its_steps_and_without_a_delimiter_stays_what_it_was() -> None:
    rollout = make_scored(answer(length=5)).group.rollouts[0]  # five times the id 4
    assert with_steps(rollout, frozenset()) is rollout
    assert with_steps(rollout, frozenset({4})).steps == [0, 1, 2, 3, 4]


def test_the_quickstart_s_answers_have_a_step_at_each_equals_sign() -> None:
    tokenizer = Tokenizer.open(resolve("asset:quickstart-student"))
    ends = delimiter_ids("=", tokenizer.decode, tokenizer.ids)
    assert len(ends) == 1
    ids = tokenizer.encode("7+2=9+7=16-0=16")
    assert len(step_starts(ids, ends)) == 4
