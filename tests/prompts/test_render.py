from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streamopd.assets import resolve
from streamopd.errors import ConfigError, UserError
from streamopd.prompts.question import Question
from streamopd.prompts.render import Renderer
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Array, Prompt, Turn, decode, encode

PLAIN = Tokenizer.open(resolve("asset:quickstart-student"))
EXAMPLE = (Turn("system", "Reply with a JSON object."), Turn("user", "1?"), Turn("assistant", '{"answer": "1"}'))


Contexts = dict[str, tuple[Turn, ...]]


def renderer(tokenizer: Tokenizer, teachers: Contexts | None = None, system: str = "", limit: int = 512) -> Renderer:
    return Renderer(tokenizer, "run-1", "method-1", teachers or {}, system, limit)


def ids(array: Array | None) -> list[int]:
    assert array is not None
    return array.numpy().tolist()


def text(tokenizer: Tokenizer, array: Array | None) -> str:
    """As a reader sees it: special tokens fall away."""
    return tokenizer.decode(ids(array))


def test_a_question_without_template_is_encoded_as_it_stands() -> None:
    question = Question("1+2=", solution="3", teacher_id="t", meta={"style": "json"})
    prompt = renderer(PLAIN).prompt(17, question)
    assert ids(prompt.prompt_ids) == PLAIN.encode("1+2=")
    assert (prompt.id, prompt.seq, prompt.run, prompt.method) == ("p17", 17, "run-1", "method-1")
    assert (prompt.text, prompt.solution, prompt.teacher_id, prompt.meta) == ("1+2=", "3", "t", {"style": "json"})
    assert prompt.teacher_prompt_ids is None
    assert decode(Prompt, encode(prompt)) == prompt


def test_with_a_template_a_plain_question_is_a_users_turn(chat_folder: Path) -> None:
    tokenizer = Tokenizer.open(chat_folder)
    plain = renderer(tokenizer).prompt(0, Question("Hi"))
    said = renderer(tokenizer).prompt(0, Question("Hi", messages=(Turn("user", "Hi"),)))
    assert ids(plain.prompt_ids) == ids(said.prompt_ids) == tokenizer.render([Turn("user", "Hi")])


def test_the_runs_system_prompt_comes_first_unless_the_row_has_its_own(chat_folder: Path) -> None:
    tokenizer = Tokenizer.open(chat_folder)
    render = renderer(tokenizer, system="Be kind.")
    own = (Turn("system", "Be rude."), Turn("user", "Hi"))
    kind = (Turn("system", "Be kind."), Turn("user", "Hi"))
    assert ids(render.prompt(0, Question("Hi")).prompt_ids) == tokenizer.render(kind)
    assert ids(render.prompt(0, Question("Hi", messages=own)).prompt_ids) == tokenizer.render(own)


def test_a_teachers_turns_stand_for_every_system_turn_and_come_before_the_question(chat_folder: Path) -> None:
    tokenizer = Tokenizer.open(chat_folder)
    render = renderer(tokenizer, {"default": EXAMPLE}, system="Be kind.")
    own = (Turn("system", "Be rude."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "2?"))
    for question, rest in ((Question("2?"), (Turn("user", "2?"),)), (Question("2?", messages=own), own[1:])):
        prompt = render.prompt(0, question)
        assert ids(prompt.teacher_prompt_ids) == tokenizer.render((*EXAMPLE, *rest))
        assert "JSON" not in text(tokenizer, prompt.prompt_ids)


def test_only_the_teacher_that_is_named_brings_its_own_context(chat_folder: Path) -> None:
    render = renderer(Tokenizer.open(chat_folder), {"json": EXAMPLE, "plain": ()})
    assert render.prompt(0, Question("2?", teacher_id="json")).teacher_prompt_ids is not None
    assert render.prompt(0, Question("2?", teacher_id="plain")).teacher_prompt_ids is None
    assert render.prompt(0, Question("2?")).teacher_prompt_ids is None


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers_and_its_place() -> None:
    render = renderer(PLAIN, limit=4)
    assert len(render.prompt(0, Question("1+2")).prompt_ids) == 4
    with pytest.raises(UserError, match=r"Question 31 has 5 tokens, and data.max_prompt_length is 4 .* '1\+2='"):
        render.prompt(31, Question("1+2="))


def test_the_check_before_a_run_finds_the_one_that_is_too_long() -> None:
    with pytest.raises(UserError, match="Question 2 has 5 tokens"):
        renderer(PLAIN, limit=4).check([Question("1+2"), Question("3"), Question("1+2=")])


@pytest.mark.parametrize(
    ("teachers", "system", "keys"),
    [({}, "Be kind.", "data.system_prompt"), ({"math": EXAMPLE}, "", "teachers.math.teacher_prompt")],
)
def test_turns_that_no_template_can_render_are_refused_at_once(
    teachers: Contexts, system: str, keys: str
) -> None:
    with pytest.raises(ConfigError, match=f"{keys} would be a turn of a conversation"):
        renderer(PLAIN, teachers, system)


def test_questions_are_drawn_and_rendered_without_torch_and_without_transformers() -> None:
    code = (
        "import sys; import streamopd.grade.pool; from streamopd.assets import resolve; "
        "from streamopd.config import Data; from streamopd.prompts.open import open_questions; "
        "open_questions(Data(train='chain-sum'), 0, 1, resolve('asset:quickstart-student'), {}, 'r', 'm'); "
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""
