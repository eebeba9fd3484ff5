from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from streamopd.assets import resolve
from streamopd.errors import UserError
from streamopd.prompts.tokenizer import Tokenizer
from streamopd.schemas import Turn
from tests.prompts.conftest import CHATML, write_chat_folder

TEACHER, STUDENT = resolve("asset:quickstart-teacher"), resolve("asset:quickstart-student")
OURS, THEIRS = Tokenizer.open(STUDENT), AutoTokenizer.from_pretrained(STUDENT)


@given(st.text("0123456789+-=,; ", max_size=40))
def test_it_agrees_with_transformers_on_the_shipped_models(text: str) -> None:
    ids = OURS.encode(text)
    assert ids == THEIRS(text)["input_ids"]
    assert OURS.decode(ids) == THEIRS.decode(ids, skip_special_tokens=True) == text


def test_the_shipped_tokenizer_is_what_the_models_were_taught() -> None:
    assert OURS.encode("7+2=") == [1, 10, 13, 5, 15]
    assert OURS.decode([10, 13, 5, 2, 0, 0]) == "7+2"
    assert (OURS.stop_ids, OURS.pad_id, OURS.vocab_size, OURS.has_chat_template) == ((2,), 0, 19, False)


def test_equal_tables_have_equal_digests_and_one_renamed_token_another(tmp_path: Path) -> None:
    assert Tokenizer.open(TEACHER).digest == OURS.digest
    shutil.copytree(STUDENT, tmp_path / "renamed")
    table = tmp_path / "renamed" / "tokenizer.json"
    table.write_text(table.read_text().replace('";": 17', '"!": 17'))
    assert Tokenizer.open(tmp_path / "renamed").digest != OURS.digest


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [3, 1]}, {"eos_token_id": 2}, (3, 1)),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, (0,)),
        ({}, {"eos_token_id": 2}, (2,)),
        ({}, {}, (3,)),
    ],
)
def test_stop_ids_come_from_generation_config_then_config_then_the_tokenizer(
    chat_folder: Path, generation: dict[str, object], config: dict[str, object], stops: tuple[int, ...]
) -> None:
    (chat_folder / "generation_config.json").write_text(json.dumps(generation))
    (chat_folder / "config.json").write_text(json.dumps(config))
    assert Tokenizer.open(chat_folder).stop_ids == stops


def test_without_a_pad_token_the_stop_id_pads(chat_folder: Path) -> None:
    (chat_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (chat_folder / "config.json").write_text("{}")
    assert Tokenizer.open(chat_folder).pad_id == 3


def test_a_folder_that_tells_no_stop_token_is_refused(chat_folder: Path) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        (chat_folder / name).write_text("{}")
    with pytest.raises(UserError, match=r"Add eos_token_id to generation_config\.json"):
        _ = Tokenizer.open(chat_folder).stop_ids


def test_a_long_prompt_is_not_cut_even_where_the_file_says_so(chat_folder: Path) -> None:
    table = json.loads((chat_folder / "tokenizer.json").read_text())
    table["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (chat_folder / "tokenizer.json").write_text(json.dumps(table))
    assert len(Tokenizer.open(chat_folder).encode("0123456789")) == 11


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (None, "has no tokenizer.json, only chat_template.jinja, config.json, tokenizer_config.json"),
        ("version https://git-lfs.github.com/spec/v1", "tokenizer.json is not JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "it has no `model`"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_in_words(chat_folder: Path, body: str | None, sentence: str) -> None:
    (chat_folder / "tokenizer.json").unlink()
    if body is not None:
        (chat_folder / "tokenizer.json").write_text(body)
    with pytest.raises(UserError) as refusal:
        Tokenizer.open(chat_folder)
    assert sentence in str(refusal.value)


# ---------------------------------------------------------------- chat templates
words = st.text(st.characters(codec="utf-8"), max_size=12)
conversations = st.tuples(
    st.lists(words, max_size=1).map(lambda said: [("system", text) for text in said]),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), max_size=4),
    words.map(lambda text: [("user", text)]),
).map(lambda parts: [Turn(*turn) for part in parts for turn in part])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = write_chat_folder(tmp_path_factory.mktemp("both"), CHATML)
    return Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)


@given(conversation=conversations)
def test_a_conversation_has_the_ids_that_transformers_gives_it(both: tuple[Tokenizer, Any], conversation: list[Turn]) -> None:
    ours, theirs = both
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.render(conversation) == expected


ODD_TEMPLATE = """{{ bos_token }}{{ {'a<b': [1, 'é']} | tojson }}{{ missing_token }}{{ strftime_now('%Y') }}
{% set spoken = namespace(count=0) %}{% for m in messages if m.role == 'user' %}{% set spoken.count = spoken.count + 1 %}
{{ m.content }}{% endfor %}
  {% if tools is none %}no tools{% endif %} {{ spoken.count }}{{ eos_token }}"""


def test_filters_globals_and_whitespace_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "odd", ODD_TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert Tokenizer.open(folder).render([Turn(**message) for message in messages]) == expected


def test_a_template_in_the_tokenizer_config_is_found_too(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "old", "")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "[{{ messages[0].content }}]"}]
    for said in ("[{{ messages[0].content }}]", named):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": said}))
        tokenizer = Tokenizer.open(folder)
        assert tokenizer.decode(tokenizer.render([Turn("user", "hi")])) == "[hi]"


def test_a_template_can_refuse_a_conversation_in_its_own_words(chat_folder: Path) -> None:
    with pytest.raises(UserError, match="refuses a conversation of the roles user, tool: no tools here"):
        Tokenizer.open(chat_folder).render([Turn("user", "a"), Turn("tool", "b")])


ATTACKS = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_cannot_leave_the_sandbox(tmp_path: Path, attack: str) -> None:
    tokenizer = Tokenizer.open(write_chat_folder(tmp_path / "bad", attack))
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.render([Turn("user", "a")])


def test_a_template_that_is_no_jinja_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_chat_folder(tmp_path / "bad", "{% if %}"))
    with pytest.raises(UserError, match="is not valid jinja"):
        tokenizer.render([Turn("user", "a")])


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(UserError, match=r"conversation of 1 turns, but the tokenizer in .*quickstart-student has no chat"):
        OURS.render([Turn("user", "1+2=")])
