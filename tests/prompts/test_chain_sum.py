from __future__ import annotations

import re
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamopd.errors import ConfigError
from streamopd.prompts.chain_sum import ChainSum, work_out

spans = st.tuples(st.integers(2, 9), st.integers(0, 6)).map(lambda span: (span[0], span[0] + span[1]))


def moves(question: str) -> list[int]:
    return [int(move) for move in re.findall(r"[+-]?\d", question)]


@given(spans, st.text(max_size=8), st.integers(0, 1 << 40))
def test_a_question_keeps_its_rules_whatever_its_stream(span: tuple[int, int], stream: str, index: int) -> None:
    question = ChainSum(min_terms=span[0], max_terms=span[1]).draw(stream, index)
    assert re.fullmatch(r"\d([+-]\d)*=", question.text)
    assert span[0] <= len(moves(question.text)) <= span[1]
    assert min(accumulate(moves(question.text))) >= 0
    assert question.solution == str(sum(moves(question.text)))


@given(st.integers(0, 1 << 40))
def test_the_working_ends_with_the_solution_and_repeats_the_question_on_its_way(index: int) -> None:
    question = ChainSum().draw("any", index)
    work = work_out(question.text)
    assert question.completion == work
    assert work.rpartition("=")[2] == question.solution
    assert re.sub(r"=\d+", "", work) == question.text.removesuffix("=")


def test_the_working_is_written_as_the_models_learn_it() -> None:
    assert work_out("7+2+7-0+9=") == "7+2=9+7=16-0=16+9=25"


def test_every_number_of_terms_is_as_likely_as_another() -> None:
    counts = Counter(len(moves(ChainSum().draw("lengths", index).text)) for index in range(5000))
    assert sorted(counts) == [3, 4, 5, 6, 7]
    assert all(abs(count - 1000) < 150 for count in counts.values()), counts  # five standard deviations


@pytest.mark.parametrize("span", [(1, 3), (5, 4), (0, 0)])
def test_terms_that_make_no_question_are_refused_with_both_numbers(span: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"min_terms = {span[0]} and max_terms = {span[1]}"):
        ChainSum(min_terms=span[0], max_terms=span[1])
