from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamopd.assets import names, resolve
from streamopd.config import Data
from streamopd.errors import ConfigError
from streamopd.extras import from_file
from streamopd.prompts.dataset import open_dataset

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "make_quickstart_models.py"


def of_recipe(name: str) -> Any:
    return from_file(f"{RECIPE}:{name}", "recipe")


# ---------------------------------------------------------------- by name
def test_a_shipped_model_is_found_by_its_name() -> None:
    assert names() == ["quickstart-student", "quickstart-teacher"]
    assert (resolve("asset:quickstart-teacher") / "model.safetensors").is_file()


def test_a_folder_with_config_and_weights_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it has no \.safetensors file, only config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("asset:quickstart", "The package carries no model asset:quickstart. It has: asset:quickstart-student"),
        ("{tmp}/nowhere", "there is no such folder"),
        ("{tmp}/empty", "it is empty"),
        ("{tmp}/file", "that is a file, not a folder"),
        ("{tmp}", "it has no config.json, only empty, file"),
    ],
)
def test_a_model_that_is_not_there_is_told_with_what_is(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refusal:
        resolve(name.replace("{tmp}", str(tmp_path)))
    assert sentence in str(refusal.value)
    assert "asset:quickstart-teacher" in str(refusal.value)


# ---------------------------------------------------------------- the shipped models
@pytest.mark.parametrize("name", names())
def test_plain_transformers_opens_a_shipped_model(name: str) -> None:
    folder = resolve(f"asset:{name}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 494_848
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("1+2=")["input_ids"][0] == tokenizer.bos_token_id == 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in list(file.keys())  # tied: stored once


@pytest.mark.parametrize(("name", "least", "most"), [("quickstart-teacher", 0.985, 1.0), ("quickstart-student", 0.15, 0.28)])
def test_the_teacher_knows_the_held_out_questions_and_the_student_does_not(name: str, least: float, most: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve(f"asset:{name}"))
    heldout = open_dataset(Data(train="chain-sum"), 0, 1).heldout
    assert least <= of_recipe("accuracy")(model, heldout) <= most


# ---------------------------------------------------------------- the script that makes them
def test_no_held_out_question_occurs_in_any_lesson() -> None:
    questions, pupils = of_recipe("questions"), of_recipe("PUPILS")
    heldout = {question.text for question in open_dataset(Data(train="chain-sum"), 0, 1).heldout}
    for pupil in pupils:
        for number, lesson in enumerate(pupil.lessons):
            source = questions(lesson, f"{pupil.name}/{number}")
            assert not heldout & {next(source).text for _ in range(2000)}


def test_the_student_never_sees_more_than_three_terms() -> None:
    (student,) = (pupil for pupil in of_recipe("PUPILS") if pupil.name == "quickstart-student")
    source = of_recipe("questions")(student.lessons[0], "any")
    assert {len(next(source).text) // 2 for _ in range(500)} == {2, 3}


def test_a_lesson_gives_the_same_weights_again() -> None:
    lesson = of_recipe("Lesson")((2, 3), 3, 3e-3)

    def taught() -> list[torch.Tensor]:
        model = of_recipe("fresh_model")(seed=5)
        of_recipe("run_lesson")(model, lesson, of_recipe("questions")(lesson, "again"))
        return list(model.parameters())

    assert all(torch.equal(one, other) for one, other in zip(taught(), taught(), strict=True))


def test_an_untrained_model_is_a_folder_like_the_others(tmp_path: Path) -> None:
    of_recipe("save")(of_recipe("fresh_model")(seed=0), tmp_path)
    shipped = {path.name for path in resolve("asset:quickstart-teacher").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == shipped
    assert resolve(str(tmp_path)) == tmp_path
    heldout = open_dataset(Data(train="chain-sum", heldout_size=64), 0, 1).heldout
    assert of_recipe("accuracy")(AutoModelForCausalLM.from_pretrained(tmp_path), heldout) < 0.05
