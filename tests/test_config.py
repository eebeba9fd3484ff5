"""The run file: unknown keys name their neighbour, every key is read, overrides have an origin."""

from __future__ import annotations

import ast
import typing
from pathlib import Path

import pytest

from streamopd import config
from streamopd.errors import ConfigError

ROOT = Path(__file__).parent.parent
SMALL = """
[student]
model = "asset:quickstart-student"
[teachers.default]
model = "asset:quickstart-teacher"
[data]
train = "chain-sum"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


def test_an_unknown_key_names_its_nearest_neighbour(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown key learn\.lr_. Did you mean learn\.lr\?"):
        config.load(recipe, ["learn.lr_=1"])


def test_unknown_keys_are_told_at_once_and_inside_a_teacher_too(recipe: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(recipe, ["lern.lr=1", "teachers.default.modle=x"])
    assert "Unknown key lern." in str(refused.value)
    assert "Did you mean teachers.default.model?" in str(refused.value)


def test_every_missing_key_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError) as refused:
        config.load(tmp_path / "empty.toml")
    assert all(word in str(refused.value) for word in ("student.model", "[teachers.default]", "data.train"))


def test_a_value_of_the_wrong_type_names_its_key(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn\.lr: expected `float`, got `str`"):
        config.load(recipe, ["learn.lr=fast"])


@pytest.mark.parametrize(
    "override", ["max_staleness=-1", "group_size=0", "generator.top_p=0.0", "learn.lr=-1.0", "sync.keep_versions=1"]
)
def test_a_value_that_cannot_work_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        config.load(recipe, [override])


def test_an_override_says_where_it_came_from(recipe: Path) -> None:
    loaded, origins = config.load(recipe, ["learn.lr=1e-3", "name=mine"])
    assert (loaded.learn.lr, loaded.name) == (1e-3, "mine")
    assert origins["learn.lr"] == "-s learn.lr=1e-3"
    assert origins["student.model"] == str(recipe)


def test_a_missing_file_names_the_recipes_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        config.load(tmp_path / "nowhere.toml")


def test_every_key_is_read_somewhere() -> None:
    files = [file for folder in ("streamopd", "services") for file in (ROOT / folder).rglob("*.py")]
    read = set().union(*(_attributes(file) for file in files if file.name != "config.py"))
    own = _attributes(ROOT / "streamopd/config.py")
    for section in _sections(config.Config):
        for key in typing.get_type_hints(section):
            assert key in read or (key == "max_age_steps" and key in own), f"{section.__name__}.{key} is read nowhere"


def _attributes(file: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}


def _sections(kind: type) -> list[type]:
    found = [kind]
    for hint in typing.get_type_hints(kind).values():
        for candidate in (hint, *typing.get_args(hint)):
            if isinstance(candidate, type) and issubclass(candidate, config.Section):
                found += _sections(candidate)
    return found
