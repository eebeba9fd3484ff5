"""Held-out questions: let a model answer all of them, grade the answers, and say how far it is from its teacher."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from torch import nn

from streamopd.evaluate.divergence import Pair, summed_kls
from streamopd.schemas import Array, Finish, Outcome, Prompt

HELDOUT_SEED = 20_261_124  # part of every sampling seed here, so that no held-out answer shares one with training

Kind = Literal["greedy", "sampled"]
Context = Callable[[Prompt], Array]
Decode = Callable[[list[int]], str]
Grade = Callable[[list[tuple[Prompt, str, bool]]], Sequence[Outcome | None]]  # (prompt, text, stopped by itself)


class Engine(Protocol):
    """What this module asks of a generator's engine. Its temperature says whether answers are greedy or sampled."""

    @property
    def inflight(self) -> int: ...
    @property
    def free(self) -> int: ...
    def admit(self, requests: Any) -> None: ...
    def step(self) -> Sequence[Any]: ...


class Heard(Struct, frozen=True):
    """One answer to one held-out prompt."""

    prompt: Prompt
    completion_ids: NDArray[np.int32]  # [G], the stop id included when it stopped by itself
    finish: Finish


class Heldout(Struct, frozen=True):
    """All answers of one model, with their grades and figures."""

    answers: list[Heard]               # in the order of the prompts
    outcomes: list[Outcome | None]
    metrics: dict[str, float]


def accuracy(
    engine: Engine,
    make_request: Callable[..., Any],
    prompts: Sequence[Prompt],
    grade: Grade,
    decode: Decode,
    *,
    kind: Kind,
    max_new: int,
    seed: int = 0,
    context: Context | None = None,
) -> Heldout:
    """Answer, grade, count. `make_request` is the engine's Request class; `context` is what the model sees of a prompt.

    Metrics: accuracy_<kind>, and <metric>/<style> where prompts name a style; from greedy answers also
    completion_length and truncated_ratio.
    """
    answers = answer_all(engine, make_request, prompts, max_new, seed, context or student_context)
    outcomes = list(grade([(a.prompt, decode(a.completion_ids.tolist()), a.finish is Finish.STOP) for a in answers]))
    metrics = accuracies(kind, answers, outcomes)
    if kind == "greedy":
        metrics |= by_style("completion_length", [(a.prompt, float(len(a.completion_ids))) for a in answers])
        metrics |= by_style("truncated_ratio", [(a.prompt, float(a.finish is Finish.LENGTH)) for a in answers])
    return Heldout(answers, outcomes, metrics | {"prompts": float(len(prompts))})


def answer_all(
    engine: Engine, make_request: Callable[..., Any], prompts: Sequence[Prompt], max_new: int, seed: int, context: Context
) -> list[Heard]:
    """One answer to each prompt, in order. The engine must be empty; it is empty again afterwards."""
    assert not engine.inflight, f"the engine still holds {engine.inflight} requests of somebody else"
    waiting = [
        make_request(id=str(i), prompt_ids=context(prompt).numpy(), seed=(HELDOUT_SEED, seed, i), max_new=max_new)
        for i, prompt in enumerate(prompts)
    ]
    heard: dict[int, Heard] = {}
    while len(heard) < len(prompts):
        joining = waiting[: engine.free]
        engine.admit(joining)
        del waiting[: len(joining)]
        for answer in engine.step():
            index = int(answer.request.id)
            heard[index] = Heard(prompts[index], np.asarray(answer.completion_ids, np.int32), Finish(answer.finish))
    return [heard[index] for index in range(len(prompts))]


def student_context(prompt: Prompt) -> Array:
    """What the student sees before its answer."""
    return prompt.prompt_ids


def teacher_context(prompt: Prompt) -> Array:
    """What the prompt's teacher sees before the answer."""
    return prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids


def accuracies(kind: Kind, answers: Sequence[Heard], outcomes: Sequence[Outcome | None]) -> dict[str, float]:
    """Share of correct answers among those with a verdict; without any, no figure. `ungraded`: how many grading failed on."""
    verdicts = [
        (answer.prompt, float(outcome.correct))
        for answer, outcome in zip(answers, outcomes, strict=True)
        if outcome is not None and outcome.correct is not None
    ]
    ungraded = sum(outcome is None for outcome in outcomes)
    metrics = by_style(f"accuracy_{kind}", verdicts)
    return metrics | {"ungraded": float(ungraded)} if metrics and ungraded else metrics


def kl_heldout(
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    teacher_answers: Sequence[Heard],
    student_answers: Sequence[Heard],
) -> dict[str, float]:
    """Nats a token over the full vocabulary, each model under its own context.

    kl_teacher_student = KL(teacher‖student) on the teachers' sampled answers; kl_student_teacher = KL(student‖teacher)
    on the student's. `teachers` by teacher_id. Also <metric>/<style>.
    """
    metrics: dict[str, float] = {}
    for name, answers, teacher_first in (
        ("kl_teacher_student", teacher_answers, True),
        ("kl_student_teacher", student_answers, False),
    ):
        unknown = sorted(set(_by_teacher(answers)) - set(teachers))
        assert not unknown, f"held-out prompts name teachers {unknown}, known are {sorted(teachers)}"
        metrics |= _kl_per_token(name, student, teachers, answers, teacher_first)
    return metrics


def shown(heldout: Heldout, decode: Decode, count: int) -> list[dict[str, str]]:
    """A few answers for people, styles in turn; the same prompts for every model."""
    verdict = {True: "yes", False: "no", None: ""}
    chosen = _in_turn([answer.prompt for answer in heldout.answers])[:count]
    return [
        {
            "prompt": heldout.answers[i].prompt.text,
            "completion": decode(heldout.answers[i].completion_ids.tolist()),
            "correct": verdict[outcome.correct if (outcome := heldout.outcomes[i]) else None],
        }
        for i in chosen
    ]


def by_style(name: str, values: Sequence[tuple[Prompt, float]]) -> dict[str, float]:
    """Mean of all as `name`, and of each style (prompt.meta["style"]) as `name/style`; {} of nothing."""
    if not values:
        return {}
    styles: dict[str, list[float]] = defaultdict(list)
    for prompt, value in values:
        if "style" in prompt.meta:
            styles[prompt.meta["style"]].append(value)
    return {name: fmean(value for _, value in values)} | {f"{name}/{style}": fmean(styles[style]) for style in sorted(styles)}


def _kl_per_token(
    name: str, student: nn.Module, teachers: Mapping[str, nn.Module], answers: Sequence[Heard], teacher_first: bool
) -> dict[str, float]:
    """One direction of KL: token means over all answers and over each style."""
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for teacher_id, theirs in _by_teacher(answers).items():
        teacher = teachers[teacher_id]
        p, q = (teacher, student) if teacher_first else (student, teacher)
        sums = summed_kls(p, q, [_pair(answer, teacher_first) for answer in theirs])
        for answer, nats_of_answer in zip(theirs, sums, strict=True):
            for key in (name, *(f"{name}/{style}" for style in _styles(answer.prompt))):
                nats[key] += nats_of_answer
                tokens[key] += len(answer.completion_ids)
    return {key: nats[key] / tokens[key] for key in nats if tokens[key]}


def _pair(answer: Heard, teacher_first: bool) -> Pair:
    of_teacher, of_student = teacher_context(answer.prompt).numpy(), student_context(answer.prompt).numpy()
    return Pair(*((of_teacher, of_student) if teacher_first else (of_student, of_teacher)), answer.completion_ids)


def _by_teacher(answers: Sequence[Heard]) -> dict[str, list[Heard]]:
    groups: dict[str, list[Heard]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.teacher_id].append(answer)
    return dict(groups)


def _styles(prompt: Prompt) -> list[str]:
    return [prompt.meta["style"]] if "style" in prompt.meta else []


def _in_turn(prompts: Sequence[Prompt]) -> list[int]:
    """Indices: the first prompt of every style, then the second of every style, and so on."""
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for prompt in prompts:
        style = tuple(_styles(prompt))
        turns.append(seen[style])
        seen[style] += 1
    return sorted(range(len(prompts)), key=turns.__getitem__)
