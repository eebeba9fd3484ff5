"""What a method needs of a run, and where a run cannot give it: found out before the first process starts, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator

from streamopd.config import Config
from streamopd.slots import Coin, Method, NoCorrection, Pool, StepRatio, Until

CHOSEN_BY_ITSELF = ("completions", "sglang")   # servers that score no ids but their own and the written one
WITHOUT_ENTROPY = ("completions", "sglang", "vllm")


def needs(method: Method) -> list[str]:
    """What it asks of a run, a few words each: of teachers first, then of everything else."""
    return [*asked_of_teachers(method), *(words for holds, words in (
        (method.needs_reference, "a reference"),
        (method.needs_grades, "grades"),
        (method.least_group > 1, f"{method.least_group}+ answers a prompt"),
        (method.needs_writing_teacher, "a teacher that writes"),
        (method.needs_gold, "gold answers"),
        (isinstance(method.teachers, Pool), "several teachers"),
        (method.surveys, "each step read twice"),
    ) if holds)]


def asked_of_teachers(method: Method) -> list[str]:
    """What a teacher must say of each token."""
    evidence = method.evidence
    if not method.needs_teacher:
        return []
    told = [words for holds, words in (
        (evidence.full, "every id"),
        (evidence.hidden, "hidden states"),
        (evidence.teacher_k > 0, f"top {evidence.teacher_k}"),
        (evidence.student_ids, f"student's {method.student_k}"),
        (bool(evidence.slice_ids), f"{len(evidence.slice_ids)} ids"),
        ("teacher_entropy" in method.facts, "entropy"),
    ) if holds]
    return told or ["the written token"]


# ---------------------------------------------------------------- what a run has not
def lacking(method: Method, config: Config, grader: str) -> list[str]:
    """What the method needs and the run has not, one sentence each; [] when it has it all. `grader` is the one that will grade."""
    return [
        *_answers(method, config, grader),
        *_gold(method, config),
        *_plateaus(method, grader),
        *_evidence(method, config),
        *_several(method, config),
        *_progress(method, config),
        *_kernel(method, config),
    ]


def _answers(method: Method, config: Config, grader: str) -> Iterator[str]:
    """Graded, enough of them, and none taken out that the method speaks to."""
    if method.needs_grades and grader == "none":
        yield (
            f'method = "{method.name}" learns from grades, but nothing grades {config.data.train}: data.grader = "{config.data.grader}". '
            'Set it (math-verify, json-answer, FILE.py:NAME), or choose a method without grades.'
        )
    if method.needs_grades and config.pack.drop_incorrect:
        yield (
            f'method = "{method.name}" compares correct answers with wrong ones, but pack.drop_incorrect = true takes the wrong ones out. '
            "Set it to false."
        )
    if config.group_size < method.least_group:
        yield (
            f'method = "{method.name}" needs at least {method.least_group} answers to a prompt, group_size is {config.group_size}. '
            f"Set group_size = {method.least_group} or more."
        )
    if any(isinstance(slot, StepRatio) for slot in method.slots) and not config.generator.step_delimiter:
        yield (
            f'method = "{method.name}" weighs the steps of an answer, but generator.step_delimiter = "" makes one step of each. Set it to '
            'the text that a step ends with, like "\\n".'
        )
    if config.pack.drop_truncated and any(isinstance(behaviour, Until) for behaviour in method.behaviours):
        yield (
            f'method = "{method.name}" ends answers early on purpose, but pack.drop_truncated = true takes such answers out. '
            "Set it to false."
        )


def _gold(method: Method, config: Config) -> Iterator[str]:
    """Who writes the dataset's own answers down. Whether it has them is seen when they are rendered: prompts/gold.py."""
    if method.needs_gold and config.generator.engine != "hf":
        yield (
            f'method = "{method.name}" puts answers of the data among the student\'s, with the student\'s log-probs of them, which '
            f'generator.engine = "{config.generator.engine}" cannot tell of text that is not its own. Set it to "hf".'
        )
    if config.group_size > 1 and any(isinstance(behaviour, Coin) and behaviour.author == "gold" for behaviour in method.behaviours):
        yield (
            f'method = "{method.name}" throws a coin for each answer, and the data has one answer to a prompt: with group_size = '
            f'{config.group_size} it would stand there several times. Set group_size = 1, or use Members("gold").'
        )
    if method.needs_gold and config.pack.drop_incorrect:
        yield (
            f'method = "{method.name}" learns from answers of the data, and pack.drop_incorrect = true takes out those that the grader '
            "does not like. Set it to false."
        )


def _plateaus(method: Method, grader: str) -> Iterator[str]:
    """A stage cannot end on a figure that is never there."""
    for number, stage in enumerate(method.stages):
        figure = stage.plateau.figure if stage.plateau else ""
        begins = f'method = "{method.name}" ends stage {number} on a plateau of {figure!r}, '
        if figure == "accuracy" and grader == "none":
            yield f'{begins}but nothing grades: data.grader = "none". Set it, or look at another figure.'
        if figure == "accuracy" and isinstance(stage.behaviour, Coin) and stage.behaviour.student == 0:
            yield f"{begins}which is the student's, and there the student writes nothing. Look at another figure."
        if figure == "overlap_ratio" and not method.needs_teacher:
            yield f"{begins}but no teacher is asked anything. Look at another figure."


def _evidence(method: Method, config: Config) -> Iterator[str]:
    """What a server says of a token. Caps and whole vocabularies are measured by the probe; this is known before."""
    evidence, candidates = method.evidence, method.evidence.student_ids and not method.evidence.tail
    for teacher_id, teacher in config.teachers.items():
        if not teacher.urls:
            continue
        name = f'teachers.{teacher_id}, a server with api = "{teacher.api}",'
        if candidates and teacher.api in CHOSEN_BY_ITSELF:
            yield (
                f'method = "{method.name}" is about the student\'s own {method.student_k} likeliest ids, which {name} cannot score. '
                "Use a folder, api = \"vllm\" or \"streamopd\", or a method whose support keeps a tail."
            )
        if "teacher_entropy" in method.facts and not evidence.full and teacher.api in WITHOUT_ENTROPY:
            yield (
                f'method = "{method.name}" looks at the teacher\'s entropy, which {name} does not tell. '
                'Use a folder or api = "streamopd", or a method without.'
            )


def _several(method: Method, config: Config) -> Iterator[str]:
    """Teachers to pool; score/panel.py asks whether the pool's weights are theirs."""
    here = sorted(name for name, teacher in config.teachers.items() if teacher.role == "teacher")
    if isinstance(method.teachers, Pool) and len(here) < 2:
        yield f'method = "{method.name}" pools several teachers, the run has one: {", ".join(here)}. Add another [teachers.NAME].'


def _progress(method: Method, config: Config) -> Iterator[str]:
    """How far a run is can be told only of one whose end is known."""
    if config.learn.max_steps == 0 and (method.stages or method.at(0.0) != method.at(1.0)):
        what = "goes through stages" if method.stages else "has numbers that move"
        yield f'method = "{method.name}" {what} over the run, but learn.max_steps = 0 leaves its end open. Set it.'


def _kernel(method: Method, config: Config) -> Iterator[str]:
    """A policy gradient is of tokens that were drawn, with the probability that they had."""
    if not any(branch.form == "policy_gradient" for branch in method.all_branches):
        return
    if config.generator.temperature == 0:
        yield (
            f'method = "{method.name}" is a policy gradient, which learns from draws, but generator.temperature = 0 draws nothing. '
            "Set it to 1, or choose a method of form \"direct\"."
        )
    corrections = {branch.correction or method.correction for branch in method.all_branches if branch.form == "policy_gradient"}
    corrected = sorted(type(correction).__name__ for correction in corrections if not isinstance(correction, NoCorrection))
    if config.generator.top_p < 1 and corrected:
        yield (
            f'method = "{method.name}" divides p by what the tokens were drawn with ({", ".join(corrected)}), but '
            f"generator.top_p = {config.generator.top_p:g} draws from another kernel, cut and renormalised. Set it to 1."
        )
