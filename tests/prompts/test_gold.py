"""The dataset's own answer as ids: ended, whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamopd.assets import resolve
from streamopd.config import Data
from streamopd.errors import UserError
from streamopd.prompts.gold import gold_ids
from streamopd.prompts.open import open_questions
from streamopd.prompts.question import Question
from streamopd.prompts.render import Renderer
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Prompt, decode, encode

STUDENT = resolve("asset:quickstart-student")
PLAIN = Tokenizer.open(STUDENT)
WORKED = Question("7+2-0=", completion="7+2=9-0=9")


def renderer(longest: int) -> Renderer:
    return Renderer(PLAIN, "run-1", "method-1", {}, "", 512, longest)


def test_the_answer_follows_the_prompt_and_ends_with_the_stop_id() -> None:
    prompt = renderer(33).prompt(0, WORKED)
    assert prompt.gold_ids is not None
    whole = PLAIN.encode("7+2-0=7+2=9-0=9")
    assert [*prompt.prompt_ids.numpy().tolist(), *prompt.gold_ids.numpy().tolist()] == [*whole, 2]
    assert decode(Prompt, encode(prompt)) == prompt


def test_nothing_is_rendered_that_no_method_asks_for() -> None:
    assert renderer(0).prompt(0, WORKED).gold_ids is None
    assert renderer(33).prompt(0, WORKED, gold=False).gold_ids is None
    assert renderer(33).prompt(0, Question("1+2="), gold=False).gold_ids is None


def test_every_worked_answer_of_the_quickstart_fits_and_is_its_solution() -> None:
    """33 is what the recipe allows: 31 characters and the stop id."""
    dataset, render = open_questions(Data(train="chain-sum"), 0, 1, STUDENT, {}, "r", "m", 33)
    for seq in range(200):
        prompt = render.prompt(seq, dataset.question(seq))
        assert prompt.gold_ids is not None
        assert PLAIN.decode(prompt.gold_ids.numpy().tolist()).rpartition("=")[2] == prompt.solution


def test_the_longest_that_fits_is_taken_and_one_more_is_refused_with_both_numbers() -> None:
    assert len(gold_ids(4, WORKED, PLAIN, 10)) == 10
    with pytest.raises(UserError, match=r"answer to question 4 has 10 tokens with its end, .*max_completion_length is 9 .*Raise it to 10"):
        gold_ids(4, WORKED, PLAIN, 9)


def test_a_question_without_an_answer_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"Question 4 comes without an answer.*'1\+2='.*a column \"completion\".*chain-sum"):
        gold_ids(4, Question("1+2=", solution="3"), PLAIN, 33)


def chat(folder: Path, *stops: int) -> Tokenizer:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops)}))
    return Tokenizer.open(folder)


@pytest.mark.parametrize(("stops", "end"), [((1, 3), 3), ((3, 1), 3), ((1,), 1)])
def test_it_ends_with_the_tokenizers_eos_where_that_ends_answers_and_begins_without_a_bos(
    chat_folder: Path, stops: tuple[int, ...], end: int
) -> None:
    tokenizer = chat(chat_folder, *stops)
    ids = gold_ids(0, Question("?", completion="Hi"), tokenizer, 33)
    assert ids == [*tokenizer.encode("Hi")[1:], end]
    assert tokenizer.encode("Hi")[0] == 1  # the tokenizer's own BOS


def test_an_end_that_the_data_wrote_is_not_doubled_and_one_in_the_middle_is_refused(chat_folder: Path) -> None:
    tokenizer = chat(chat_folder, 3)
    plain, ended = (gold_ids(0, Question("?", completion=text), tokenizer, 33) for text in ("Hi", "Hi<|im_end|>"))
    assert plain == ended
    with pytest.raises(UserError, match=r"answer to question 7 has 6 tokens, and number 3 of them ends it \(\(3,\) do\)"):
        gold_ids(7, Question("?", completion="Hi<|im_end|>Ho"), tokenizer, 33)
