from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamopd.config import Data
from streamopd.errors import ConfigError
from streamopd.prompts.dataset import open_dataset

CHAIN = Data(train="chain-sum")
NARROW = Data(train="chain-sum", options={"min_terms": 2, "max_terms": 2}, heldout_size=100)  # 155 questions in all

seeds = st.integers(0, 1 << 31)
seqs = st.integers(0, 1 << 40)


@settings(max_examples=30)
@given(seeds, st.lists(seqs, min_size=1, max_size=5))
def test_a_question_depends_on_seed_and_seq_alone(seed: int, asked: list[int]) -> None:
    one, other = open_dataset(CHAIN, seed, 1), open_dataset(CHAIN, seed, 3)
    forth = [one.question(seq) for seq in asked]
    back = [other.question(seq) for seq in reversed(asked)]
    assert forth == back[::-1]


@given(seeds, seqs)
def test_a_held_out_question_is_never_issued(seed: int, seq: int) -> None:
    dataset = open_dataset(NARROW, seed, 1)  # most draws are held-out ones
    question = dataset.question(seq)
    assert question is not None
    assert question.text not in {held.text for held in dataset.heldout}


@settings(max_examples=20)
@given(seeds)
def test_the_held_out_questions_are_the_same_for_every_seed(seed: int) -> None:
    assert open_dataset(CHAIN, seed, 1).heldout == open_dataset(CHAIN, 0, 1).heldout


def test_the_held_out_questions_are_distinct_and_as_many_as_asked_for() -> None:
    assert len({question.text for question in open_dataset(CHAIN, 0, 1).heldout}) == 256


def test_two_seeds_ask_different_questions() -> None:
    one, other = open_dataset(CHAIN, 1, 1), open_dataset(CHAIN, 2, 1)
    same = sum(one.question(seq) == other.question(seq) for seq in range(200))
    assert same < 10  # three-term questions meet by chance


def test_a_task_is_endless() -> None:
    dataset = open_dataset(CHAIN, 0, 1)
    assert dataset.size is None
    assert dataset.question(10**12) is not None


def test_the_digest_speaks_of_the_task_and_not_of_the_run() -> None:
    digest = open_dataset(CHAIN, 0, 1).digest
    assert open_dataset(CHAIN, 7, 9).digest == digest
    assert open_dataset(Data(train="chain-sum", options={"max_terms": 6}), 0, 1).digest != digest
    assert open_dataset(Data(train="chain-sum", heldout_size=255), 0, 1).digest != digest


def test_more_held_out_questions_than_the_task_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heldout_size = 256.* gave 155 distinct questions"):
        open_dataset(Data(train="chain-sum", options={"min_terms": 2, "max_terms": 2}), 0, 1)


def test_a_task_that_is_held_out_whole_is_refused_at_its_first_question() -> None:
    dataset = open_dataset(Data(train="chain-sum", options={"min_terms": 2, "max_terms": 2}, heldout_size=155), 0, 1)
    with pytest.raises(ConfigError, match=r"were all among its 155 held-out"):
        dataset.question(0)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (Data(train="chain-sums"), "Did you mean chain-sum?"),
        (Data(train="something-else"), "The forms are: chain-sum, reasoning-gym:TASK, FILE.jsonl"),
        (Data(train="chain-sum", options={"terms": 4}), "no option 'terms'. It has: min_terms, max_terms"),
        (Data(train="chain-sum", options={"min_terms": "two"}), "Expected `int`"),
        (Data(train="reasoning-gym:chain_sums"), "Did you mean chain_sum"),
        (Data(train="reasoning-gym:chain_sum", options={"max_term": 4}), "refuses data.options {'max_term': 4}"),
        (Data(train="reasoning-gym:chain_sum", options={"min_terms": 9, "max_terms": 2}), "refuses data.options"),
    ],
)
def test_a_wrong_task_or_option_is_refused_in_words(data: Data, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        open_dataset(data, 0, 1)
    assert sentence in str(refusal.value)


# ---------------------------------------------------------------- reasoning-gym
GYM = Data(train="reasoning-gym:chain_sum", options={"min_terms": 2, "max_terms": 3}, heldout_size=16)


def test_a_gym_question_depends_on_seed_and_seq_alone() -> None:
    asked = [0, 5000, 3, 10**9, 511, 512]  # far apart, and on both sides of a chunk's end
    one, other = open_dataset(GYM, 4, 1), open_dataset(GYM, 4, 1)
    assert [one.question(seq) for seq in asked] == [other.question(seq) for seq in reversed(asked)][::-1]
    assert len({one.question(seq).text for seq in asked}) == len(asked)


def test_gym_questions_of_neighbouring_seeds_do_not_overlap() -> None:
    """The library draws entry i from its seed + i: seed 1 would be seed 0 moved by one."""
    one = {open_dataset(GYM, 0, 1).question(seq).text for seq in range(50)}
    other = {open_dataset(GYM, 1, 1).question(seq).text for seq in range(50)}
    assert len(one & other) < 5


def test_a_gym_question_carries_the_entry_that_its_scorer_wants() -> None:
    question = open_dataset(GYM, 0, 1).question(0)
    entry = json.loads(question.meta["entry"])
    assert question.meta["task"] == "chain_sum"
    assert (question.text, question.solution) == (entry["question"], entry["answer"])


def test_a_gym_task_whose_scorer_cannot_read_json_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"own answer 1\.0, but 0\.05 once the entry has been JSON"):
        open_dataset(Data(train="reasoning-gym:rearc", heldout_size=4), 0, 1)


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # how Python itself marks a module that cannot be imported
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'streamopd\[tasks\]'"):
        open_dataset(GYM, 0, 1)
