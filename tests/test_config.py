"""The run file: unknown keys name their neighbour, every key is read, overrides have an origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamopd import config
from streamopd.errors import ConfigError
from tests.config_reads import unread

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
    "override",
    ["max_staleness=-1", "group_size=0", "group_size=65", "generator.top_p=0.0", "learn.lr=-1.0", "sync.keep_versions=1"],
)
def test_a_value_that_cannot_work_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        config.load(recipe, [override])


def test_a_group_that_does_not_fit_into_a_generator_is_refused_with_both_numbers(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"group_size is 8, generator\.max_inflight is 4"):
        config.load(recipe, ["group_size=8", "generator.max_inflight=4"])
    config.load(recipe, ["group_size=4", "generator.max_inflight=4"])


@pytest.mark.parametrize(
    "url",
    [
        "redis://:geheim@host:6379/0", "rediss://me:geheim@host", "redis://:ge/heim@host", "unix://:geheim@/run/a.sock",
        "unix:///run/a.sock?db=1&password=geheim", "redis://host?pass%77ord=geheim", ":geheim@host:6379",
    ],
)
def test_a_password_in_the_url_is_refused_without_being_repeated(recipe: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.password_env") as refused:
        config.load(recipe, [f"redis.url={url}"])
    assert "heim" not in str(refused.value)


@pytest.mark.parametrize("url", ["redis://host:6379/0", "rediss://me@host:6379", "unix:///run/a.sock?db=1", "redis://[::1]:6379"])
def test_a_url_without_a_password_is_taken(recipe: Path, url: str) -> None:
    loaded, _ = config.load(recipe, [f"redis.url={url}"])
    assert loaded.redis.url == url


def test_an_override_says_where_it_came_from(recipe: Path) -> None:
    loaded, origins = config.load(recipe, ["learn.lr=1e-3", "name=mine"])
    assert (loaded.learn.lr, loaded.name) == (1e-3, "mine")
    assert origins["learn.lr"] == "-s learn.lr=1e-3"
    assert origins["student.model"] == str(recipe)


def test_a_missing_file_names_the_recipes_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        config.load(tmp_path / "nowhere.toml")


# ---------------------------------------------------------------- no key without effect
def test_every_key_is_read_somewhere() -> None:
    own = ROOT / "streamopd/config.py"
    files = [file for folder in ("streamopd", "services") for file in (ROOT / folder).rglob("*.py") if file != own]
    assert unread(config.Config, [file.read_text() for file in files], own.read_text()) == []


class Bowl(config.Section, frozen=True):
    """A section for the checker."""

    eaten: int = 0
    left: int = 0


class Cup(config.Section, frozen=True):
    """Another."""

    full: bool = True


class Table(config.Section, frozen=True, kw_only=True):
    """A configuration for the checker."""

    bowl: Bowl = Bowl()
    spare: Bowl = Bowl()
    guests: dict[str, Bowl]
    cup: Cup = Cup()
    lit: bool = True


KEYS = ("bowl.eaten", "bowl.left", "spare.eaten", "spare.left", "guests.*.eaten", "guests.*.left", "cup.full", "lit")


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("def f(run): return run.config.bowl.eaten", ["bowl.eaten"]),
        ("def f(run):\n    b = run.config.bowl\n    return b.eaten", ["bowl.eaten"]),
        ("def f(run):\n    c, b = run.config, run.config.bowl\n    return [b.left for _ in c.lit]", ["bowl.left", "lit"]),
        ("def f(cup: config.Cup | None): return cup.full", ["cup.full"]),
        ("from streamopd.config import Cup\ndef f(cup: Cup): return cup.full", ["cup.full"]),
        ("def f(run): return [g.left for g in run.config.guests.values()]", ["guests.*.left"]),
        ("def f(run, name): return run.config.guests[name].left", ["guests.*.left"]),
        ("def f(run):\n    b = run.config.bowl\n    def g(): return b.eaten\n    return g", ["bowl.eaten"]),
        ("t, _ = config.load('x')\nt.lit", ["lit"]),
        # and what is no read of a key
        ("def f(other): return other.bowl.eaten + other.lit", []),
        ("def f(run):\n    b = run.config.bowl\ndef g(b): return b.eaten", []),
        ("def f(run): return run.config.bowl", []),
        ("def f(run): run.config.bowl.eaten = 1", []),
        ("class Cup: ...\ndef f(cup: Cup): return cup.full", []),
    ],
)
def test_a_key_counts_as_read_where_its_own_section_is_and_nowhere_else(source: str, read: list[str]) -> None:
    assert unread(Table, [source]) == sorted(set(KEYS) - set(read))


def test_a_key_behind_a_property_is_read_when_the_property_is() -> None:
    own = "class Table:\n    @property\n    def hunger(self):\n        return self.bowl.left"
    assert "bowl.left" in unread(Table, ["def f(run): return run.config.lit"], own)
    assert "bowl.left" not in unread(Table, ["def f(run): return run.config.hunger"], own)
