"""Every method is a value that says where it comes from, and its tables say what it is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from streamopd import config as configs
from streamopd import methods
from streamopd.errors import ConfigError
from streamopd.methods.about.describe import card, composition
from streamopd.methods.about.table import TABLES, every_method, with_tables
from streamopd.slots import Branch, Cosine, Linear, Method, Moving, ReverseKL, Slot, Stage, inside

ROOT = Path(__file__).parent.parent.parent
HELPERS = {path.stem for path in (ROOT / "streamopd" / "methods" / "about").glob("*.py")} | {"about"}


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    method = methods.load(name)
    assert method.name == name
    assert method.summary
    assert method.formula
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}|[A-Z][\w ]+ 20\d\d", method.paper), method.paper
    assert method.note or method.evidence_level != "inspired by" or method.alias_of
    assert len(method.note) < 140, "one sentence"


@pytest.mark.parametrize("name", methods.names())
def test_its_docstring_cites_what_the_value_cites(name: str) -> None:
    text = (ROOT / "streamopd" / "methods" / f"{name}.py").read_text()
    assert text.split('"""')[1].count(methods.load(name).paper.removesuffix(" 2025")) >= 1


def test_no_two_methods_are_one_composition_unless_they_say_so() -> None:
    named = defaultdict(list)
    for method in every_method():
        named[method.digest].append(method)
    for same in named.values():
        first = [method.name for method in same if not method.alias_of]
        assert len(first) == 1, f"{[method.name for method in same]} are one composition: let all but one say alias_of"
        assert {method.alias_of for method in same} <= {"", *first}


def test_an_alias_is_what_it_says() -> None:
    for method in every_method():
        if method.alias_of:
            assert methods.load(method.alias_of).digest == method.digest


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_at_a_moment_no_number_moves(name: str, progress: float) -> None:
    now = methods.load(name).at(progress)
    assert not now.stages
    every: list[Slot] = [slot for branch in now.branches for slot in inside(branch)] + list(inside(now.behaviour))
    assert not [slot for slot in every if isinstance(slot, Moving)]


@pytest.mark.parametrize("name", methods.names())
def test_what_a_paper_suggests_are_keys_of_a_run_file(name: str) -> None:
    known = dict(configs.reference())
    for key, value in methods.load(name).suggests:
        assert key in known, key
        parsed = tomllib.loads(f"x = {value}")["x"]
        assert isinstance(parsed, int if isinstance(known[key], int) else int | float), f"{key} = {value}"


def test_methods_are_values_without_torch() -> None:
    look = "import sys; from streamopd.methods.about.table import every_method; from streamopd.methods.about.needs import lacking; "
    look += "print(len(every_method()), {'torch', 'transformers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told.split() == [str(len(methods.names())), "set()"]


# ---------------------------------------------------------------- finding them
def test_helpers_are_no_methods() -> None:
    assert not HELPERS & set(methods.names())


def test_a_file_of_a_users_own_is_found_and_may_hold_several(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from streamopd.slots import *\n"
        "ONE = Method(name='one', summary='', branches=(Branch(loss=ForwardKL()),))\n"
        "TWO = Method(name='two', summary='', branches=(Branch(loss=ReverseKL(), form='policy_gradient'),))\n"
    )
    before = methods.names()
    assert [methods.load(f"{file}:{name}").name for name in ("ONE", "TWO")] == ["one", "two"]
    assert methods.names() == before
    with pytest.raises(ConfigError, match="has no 'THREE'"):
        methods.load(f"{file}:THREE")
    with pytest.raises(ConfigError, match=r"mine\.py:NAME"):
        methods.load(str(file))


def test_a_file_in_the_folder_is_a_method_without_editing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fresh_idea.py").write_text("from streamopd.slots import Method\nFRESH = Method(name='fresh_idea', summary='new')\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "fresh_idea" in methods.names()
    assert methods.load("fresh_idea").summary == "new"


# ---------------------------------------------------------------- what is said of them
@pytest.mark.parametrize("file", TABLES, ids=str)
def test_the_tables_are_what_the_values_say(file: Path) -> None:
    text = (ROOT / file).read_text()
    assert with_tables(text, file) == text, f"{file} is behind: python -m streamopd.methods.about.table"


def test_a_composition_names_what_is_set() -> None:
    assert composition(methods.load("eopd")) == (
        "ReverseKL (PG) + ForwardKL on TeacherTop(16, drop) where TeacherEntropy(0.8); ClippedRatio(0.2, 0.2)"
    )
    assert composition(methods.load("qwen3")) == (
        "ForwardKL on Union(16, 64), by Coin(0) until 0.5 → ReverseKL on Union(16, 64) where WrittenBy(student)"
    )


def test_no_two_compositions_read_alike() -> None:
    said = [composition(method) for method in every_method() if not method.alias_of]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("name", methods.names())
def test_show_tells_every_value(name: str) -> None:
    method = methods.load(name)
    told = card(method)
    for wanted in (method.paper, method.formula, method.evidence_level, method.note, *(f"-s {k}={v}" for k, v in method.suggests)):
        assert wanted in told
    for slot in (*method.slots, *method.behaviours, method.teachers, method.select):
        if not isinstance(slot, Branch | Moving):
            assert type(slot).__name__ in told or "not looked at" in told


def test_show_tells_where_moving_numbers_end_and_stages_change() -> None:
    moving = Method(
        name="moving", summary="", stages=(
            Stage(until=0.25, branches=(Branch(loss=ReverseKL(), scale=Linear(1.0, 0.0)),)),
            Stage(until=1.0, branches=(Branch(loss=ReverseKL(), scale=Cosine(0.0, 2.0)),)),
        ),
    )
    told = card(moving)
    assert "progress 0 to 0.25" in told
    assert re.search(r"scale\s+1 → 0\.75\b", told)
    assert "progress 0.25 to 1" in told
    assert re.search(r"scale\s+0\.292893 → 2\b", told)
