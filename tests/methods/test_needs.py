"""What a method needs follows from its slots, and a run that cannot give it says so before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from streamopd import config as configs
from streamopd import methods
from streamopd.cli.main import app
from streamopd.cli.run import preflight
from streamopd.config import Config, Teacher
from streamopd.errors import ConfigError, UserError
from streamopd.methods.about.needs import lacking
from streamopd.slots import Advantage, Branch, Coin, Members, Method, NoCorrection, ReverseKL, TeacherAccepts, TeacherRatio, WrittenBy

PLENTY = msgspec.convert(
    {
        "group_size": 8, "student": {"model": "s"}, "teachers": {"default": {"model": "t"}}, "data": {"train": "rows.jsonl"},
        "learn": {"max_steps": 100}, "generator": {"step_delimiter": "\n"},
    },
    Config,
)
TWO = {"math": Teacher(model="a"), "code": Teacher(model="b")}
OUTSIDE = {"default": Teacher(url="http://t:1", api="completions")}

# core.md 2.3: the least evidence of each method, where ours asks for no more
WRITTEN_TOKEN = (
    "opd", "opd_plus", "power_opd", "tv_opd", "reopold", "exopd", "exopd_guard", "sod", "kdrl", "rlad", "scope", "uni_opd", "opdvr",
    "mimo_mopd", "nemotron_cascade", "esr", "topd", "prefix_opd",
)
STUDENT_IDS = {"rethinking": 16, "many_faces": 20, "vopd": 100, "prefix_teach": 16, "trb": 16}
TEACHER_IDS = {"eopd": 16, "lsm": 32, "aopd": 16, "tropd": 64, "tgpo": 16, "stable_opd": 16}
BOTH = (
    "minillm", "gkd", "distillm", "distillm2", "veto", "taid", "tsd_kd", "qwen3", "adaswitch", "speculative_kd", "forward_kl_topk",
    "default", "gkd_gold",
)
GRADES = ("paced", "sod", "kdrl", "rlad", "tgpo", "luffy", "scope", "uni_opd", "opdvr", "mimo_mopd", "sparse_to_dense", "grpo")
PAIRS = (*(name for name in GRADES if name != "opdvr"), "distillm2", "stable_opd")
WRITES = (
    "minillm", "gkd", "distillm", "distillm2", "speculative_kd", "adaswitch", "trb", "tropd", "hpd", "paced", "qwen3", "sparse_to_dense",
    "luffy", "sft", "seqkd",
)
GOLD = ("gkd_gold", "sft_gold", "stable_opd")
REFERENCE = ("exopd", "exopd_guard", "tgpo", "stable_opd")
NO_TEACHER = ("grpo", "luffy", "sft", "sft_gold", "seqkd")


def having(**changes: object) -> Config:
    """A run that has everything, but for these keys ("generator__top_p" is a key of a table)."""
    config = PLENTY
    for key, value in changes.items():
        section, _, name = key.partition("__")
        inner = msgspec.structs.replace(getattr(config, section), **{name: value}) if name else value
        config = msgspec.structs.replace(config, **{section: inner})
    return config


@pytest.mark.parametrize("name", methods.names())
def test_needs_are_those_of_the_capability_table(name: str) -> None:
    method = methods.load(name)
    asked = method.evidence
    if name in WRITTEN_TOKEN:
        assert (asked.teacher_k, asked.student_ids, asked.full, asked.hidden) == (0, False, False, False)
    if name in STUDENT_IDS:
        assert (asked.teacher_k, asked.student_ids, method.student_k) == (0, True, STUDENT_IDS[name])
        assert not asked.tail, "without the student's ids it would be another method, and a server must not be let off"
    if name in TEACHER_IDS:
        assert (asked.teacher_k, asked.student_ids) == (TEACHER_IDS[name], False)
    if name in BOTH:
        assert asked.student_ids
        assert asked.teacher_k >= 16
    assert asked.hidden == (name == "deepseek_v4")
    assert asked.full == (name == "forward_kl")
    assert method.needs_grades == (name in GRADES)
    assert (method.least_group > 1) == (name in PAIRS)
    assert method.needs_writing_teacher == (name in WRITES)
    assert method.needs_gold == (name in GOLD)
    assert method.needs_reference == (name in REFERENCE)
    assert method.needs_teacher == (name not in NO_TEACHER)


@pytest.mark.parametrize("name", methods.names())
def test_a_run_that_has_everything_is_refused_nothing(name: str) -> None:
    config = having(teachers=TWO) if name == "deepseek_v4" else having(group_size=1) if name in ("gkd_gold", "sft_gold") else PLENTY
    assert lacking(methods.load(name), config, "math-verify") == []


@pytest.mark.parametrize(
    ("name", "changes", "grader", "words"),
    [
        ("sod", {"generator__step_delimiter": ""}, "math-verify", ('generator.step_delimiter = ""', "one step")),
        ("scope", {}, "none", ('"scope"', 'data.grader = ""', "rows.jsonl", "math-verify")),
        ("uni_opd", {}, "none", ("grades",)),
        ("scope", {"pack__drop_incorrect": True}, "math-verify", ("pack.drop_incorrect = true", "false")),
        ("grpo", {"group_size": 1}, "chain-sum", ("at least 2 answers", "group_size is 1", "group_size = 2 or more")),
        ("esr", {"pack__drop_truncated": True}, "none", ("pack.drop_truncated = true", "false")),
        ("vopd", {"teachers": OUTSIDE}, "none", ("student's own 100", '"completions"', "a folder")),
        ("rethinking", {"teachers": OUTSIDE}, "none", ("student's own 16",)),
        ("eopd", {"teachers": OUTSIDE}, "none", ("entropy", '"completions"')),
        ("deepseek_v4", {}, "none", ("pools several teachers", "has one: default")),
        ("qwen3", {"learn__max_steps": 0}, "none", ("goes through stages", "learn.max_steps = 0")),
        ("veto", {"learn__max_steps": 0}, "none", ("numbers that move", "learn.max_steps = 0")),
        ("sft_gold", {}, "none", ("the data has one answer to a prompt", "group_size = 8", "Set group_size = 1")),
        ("stable_opd", {"pack__drop_incorrect": True}, "chain-sum", ("answers of the data", "pack.drop_incorrect = true", "false")),
        ("sft_gold", {"generator__engine": "vllm", "group_size": 1}, "none", ('"sft_gold"', 'generator.engine = "vllm"', 'Set it to "hf"')),
        ("stable_opd", {"generator__engine": "scripted"}, "none", ("answers of the data", 'generator.engine = "scripted"')),
        ("opd", {"generator__temperature": 0.0}, "none", ("policy gradient", "generator.temperature = 0")),
        ("opd", {"generator__top_p": 0.9}, "none", ("TruncatedRatio", "generator.top_p = 0.9", "Set it to 1")),
    ],
)
def test_what_a_run_lacks_is_one_sentence(
    name: str, changes: dict[str, object], grader: str, words: tuple[str, ...]
) -> None:
    (told,) = lacking(methods.load(name), having(**changes), grader)
    for word in words:
        assert word in told, told


def test_several_wants_are_told_at_once() -> None:
    config = having(group_size=1, generator__engine="vllm", learn__max_steps=0)
    assert len(lacking(methods.load("sparse_to_dense"), config, "none")) == 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lsm", {"generator__top_p": 0.9}),                    # a direct loss has no ratio
        ("default", {"generator__temperature": 0.0}),          # and needs no draws
        ("default", {"teachers": OUTSIDE}),                    # its tail takes what a server cannot score
        ("opd", {"teachers": OUTSIDE}),
        ("vopd", {"teachers": {"default": Teacher(url="http://t:1", api="vllm")}}),   # measured by the probe
        ("exopd_guard", {"learn__max_steps": 0}),              # its number is computed, and does not move
    ],
)
def test_what_can_be_given_is_not_refused(name: str, changes: dict[str, object]) -> None:
    assert lacking(methods.load(name), having(**changes), "none") == []


def test_without_a_ratio_a_nucleus_is_allowed() -> None:
    plain = Method(name="plain", summary="", branches=(Branch(loss=ReverseKL(), form="policy_gradient"),), correction=NoCorrection())
    assert lacking(plain, having(generator__top_p=0.9), "none") == []



# ---------------------------------------------------------------- where a person meets it
def test_a_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart", ["method=scope", "data.grader=none"])
    with pytest.raises(ConfigError, match="at least 2 answers") as refusal:
        preflight(config, tmp_path)
    assert "learns from grades" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_task_with_a_grader_of_its_own_gives_grades(tmp_path: Path) -> None:
    config, _ = configs.load("quickstart", ["method=scope", "group_size=4"])
    preflight(config, tmp_path)


def rows_of(folder: Path, *completions: str | None) -> str:
    """A data file with such answers, as many rows without one behind them, which are held out."""
    rows = [{"prompt": f"{i}+1=", "completion": text} for i, text in enumerate(completions)]
    rows += [{"prompt": f"{i}+2="} for i in range(len(completions))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={folder / 'rows.jsonl'}"


def gold_run(train: str, held_out: int, *settings: str) -> Config:
    return configs.load("quickstart", ["method=gkd_gold", train, f"data.heldout_size={held_out}", *settings])[0]


@pytest.mark.parametrize(
    ("answers", "settings", "words"),
    [
        (("0+1=1", None), (), r"Question 1 comes without an answer, .*'1\+1='.*\"completion\""),
        (("0+1=1", ""), (), "Question 1 comes without an answer"),
        (("1", "0+1=1"), ("generator.max_completion_length=5",), r"question 1 has 6 tokens.*max_completion_length is 5 .*Raise it to 6"),
    ],
)
def test_data_that_cannot_give_gold_are_refused_before_a_run(
    tmp_path: Path, answers: tuple[str | None, ...], settings: tuple[str, ...], words: str
) -> None:
    config = gold_run(rows_of(tmp_path, *answers), 2, "data.options={}", *settings)
    with pytest.raises(UserError, match=words):
        preflight(config, tmp_path)


def test_a_task_without_answers_of_its_own_is_refused_where_gold_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Question 0 comes without an answer"):
        preflight(gold_run("data.train=reasoning-gym:chain_sum", 16, "data.options={}"), tmp_path)


def test_held_out_questions_need_no_gold_and_a_task_with_worked_answers_has_it(tmp_path: Path) -> None:
    preflight(gold_run(rows_of(tmp_path, "0+1=1", "1+1=2"), 2, "data.options={}"), tmp_path)
    preflight(gold_run("data.train=chain-sum", 16), tmp_path)


def test_the_command_lists_every_method_on_a_line_and_shows_one() -> None:
    listed = CliRunner().invoke(app, ["methods"])
    assert listed.exit_code == 0, listed.output
    assert {line.split()[0] for line in listed.output.splitlines()[3:] if line.strip()} == set(methods.names())
    shown = CliRunner().invoke(app, ["methods", "show", "vopd"])
    assert "arXiv 2605.07865" in shown.output
    assert "Baseline: k = 100" in shown.output


# ---------------------------------------------------------------- settings that say nothing
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Coin(greedy=True, author="gold"), "not drawn.*greedy=True"),
        (lambda: Members("gold", count=2), "one answer to a prompt, and `count` is 2"),
        (lambda: Method(name="mine", summary="", branches=(Branch(when=WrittenBy("gold")),)), r"no behaviour lets the dataset write"),
        (lambda: Method(name="mine", summary="", behaviour=Coin(author="golden")), "behaviour is not what it can be"),
    ],
)
def test_a_setting_of_gold_that_means_nothing_is_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


# ---------------------------------------------------------------- needs that no method here has, and a user's may
def pg(**slots: object) -> Method:
    return Method(name="mine", summary="", branches=(Branch(loss=ReverseKL(), form="policy_gradient", **slots),))  # type: ignore[arg-type]


def test_what_ranks_by_the_teacher_asks_for_its_ids_whatever_the_loss() -> None:
    assert pg(weight=(TeacherAccepts(k=5),)).evidence.teacher_k == 5
    assert pg().evidence.teacher_k == 0


def test_a_reward_inside_the_teachers_trust_region_needs_the_teacher() -> None:
    reward = (Branch(loss=Advantage(), form="policy_gradient"),)
    assert Method(name="mine", summary="", branches=reward, correction=TeacherRatio()).needs_teacher
    assert not Method(name="mine", summary="", branches=reward).needs_teacher
