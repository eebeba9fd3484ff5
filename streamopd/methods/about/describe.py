"""A method in words, all of it from its value: in one line, and every setting slot by slot."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from streamopd.slots import (
    Advantage,
    Branch,
    Cosine,
    Entropy,
    Likelihood,
    Linear,
    Method,
    OnPolicy,
    ReferenceKL,
    Slot,
    Stage,
    settled,
    summed_over,
)

from .needs import needs

FORMS = {"direct": "", "stop_gradient": " (sg)", "per_candidate": " (per candidate)", "policy_gradient": " (PG)"}
UNUSED = "not looked at"
GUARD = 1e-3  # usual numbers below keep a division from failing, and say nothing of a method
NO_TARGET = (Advantage, Entropy, Likelihood, ReferenceKL)
AROUND = ("teachers", "select", "correction", "age_weight")


# ---------------------------------------------------------------- one line
def composition(method: Method) -> str:
    """What it is made of. PG: policy gradient, sg: the log-ratio is held; what says nothing is left out."""
    whole = Stage(until=1.0, branches=method.branches, behaviour=method.behaviour)
    said = [" → ".join(_stage(stage, method.routing) for stage in method.stages or (whole,))]
    said += [short(getattr(method, name)) for name in AROUND if getattr(method, name) != _default(Method, name)]
    return "; ".join([*said, *(["each answer counts the same"] if method.reduce == "answer_mean" else [])])


def short(slot: Slot) -> str:
    """A slot's name with its numbers, and with its words where they are not the usual ones: `TeacherTop(32, renorm)`."""
    told = []
    for place, name in enumerate(slot.__struct_fields__):
        value = getattr(slot, name)
        usual = value == _default(type(slot), name)
        if isinstance(value, bool):
            told += [] if usual else [name if value else f"not {name}"]
        elif not usual or place == 0 or isinstance(value, Slot) or (isinstance(value, float | int) and value >= GUARD):
            told.append(_value(value))
    return type(slot).__name__ + (f"({', '.join(told)})" if told else "")


def _default(kind: type[Struct], name: str) -> object:
    return next(field.default for field in msgspec.structs.fields(kind) if field.name == name)


def _stage(stage: Stage, routing: str) -> str:
    wrote = "" if stage.behaviour == OnPolicy() else f", by {short(stage.behaviour)}"
    ends = [f"{stage.until:g}"] if stage.until < 1 else []
    ends += [f"a {short(stage.plateau)}"] if stage.plateau else []
    until = f" until {' or '.join(ends)}" if ends else ""
    return (" + " if routing == "additive" else ", else ").join(map(_branch, stage.branches)) + wrote + until


def _branch(branch: Branch) -> str:
    plain = Branch()
    said = short(branch.loss) + ("" if isinstance(branch.loss, Advantage) else FORMS[branch.form])
    said += f" to {short(branch.target)}" if branch.target != plain.target else ""
    said += f" on {short(branch.support)}" if summed_over(branch) else ""
    said += "".join(f", {short(shape)}" for shape in branch.shape)
    said += "".join(f" × {short(weight)}" for weight in branch.weight)
    said += f" × {_value(branch.scale)}" if branch.scale != plain.scale else ""
    return said + (f" where {short(branch.when)}" if branch.when != plain.when else "")


def _value(value: object) -> str:
    if isinstance(value, Linear | Cosine):
        return f"{value.start:g} → {value.end:g}"
    if isinstance(value, Slot):
        return short(value)
    if isinstance(value, float):
        return f"{value:g}"
    return f"({', '.join(map(_value, value))})" if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------- the whole of it
def card(method: Method) -> str:
    """Everything: the paper, what it needs, and each setting at the start and, where it moves, at the end."""
    head = [
        method.name, f"  {method.summary}", "",
        _line("paper", method.paper), _line("formula", method.formula), _line("evidence", method.evidence_level),
        *([_line("", method.note)] if method.note else []),
        *([_line("alias of", method.alias_of)] if method.alias_of else []),
        _line("composed", composition(method)), _line("needs", "; ".join(needs(method)) or "nothing"),
        *([_line("paper's run", " ".join(f"-s {key}={value}" for key, value in method.suggests))] if method.suggests else []),
        _line("digest", method.digest),
    ]
    return "\n".join([*head, "", *_settings(method)])


def _line(name: str, value: str) -> str:
    return f"  {name:12}{value}"


def _settings(method: Method) -> Iterator[str]:
    """What holds until when, and every value of every slot."""
    stages = method.stages or (Stage(until=1.0, branches=method.branches, behaviour=method.behaviour),)
    start = 0.0
    for stage in stages:
        first, last = settled(stage, start), settled(stage, _before(stage.until))
        yield f"progress {start:g} to {stage.until:g}"
        start = stage.until
        if stage.plateau:
            yield from _pairs("at most, to", stage.plateau, stage.plateau)
        yield from _pairs("behaviour", first.behaviour, last.behaviour)
        for place, (begun, ended) in enumerate(zip(first.branches, last.branches, strict=True), 1):
            yield f"  branch {place}"
            yield from _branch_settings(begun, ended)
    yield "throughout"
    yield f"  {'routing':12}{method.routing}"
    for name in AROUND:
        yield from _pairs(name, getattr(method, name), getattr(method, name))
    yield f"  {'reduce':12}{method.reduce}"


def _branch_settings(early: Branch, late: Branch) -> Iterator[str]:
    for name in early.__struct_fields__:
        first, last = getattr(early, name), getattr(late, name)
        unused = not summed_over(early) if name == "support" else isinstance(early.loss, NO_TARGET) and name == "target"
        if first is None:  # a correction of the branch's own is the exception
            continue
        if unused:
            yield f"    {name:12}{UNUSED}"
        elif isinstance(first, Slot):
            yield from _pairs(name, first, last, "    ", 12)
        elif isinstance(first, tuple):
            for one, other in zip(first, last, strict=True):
                yield from _pairs(name, one, other, "    ", 12)
        else:
            yield f"    {name:12}{_moved(first, last)}"


def _pairs(name: str, first: Slot, last: Slot, indent: str = "  ", width: int = 12) -> Iterator[str]:
    told = [f"{field} = {_moved(getattr(first, field), getattr(last, field))}" for field in first.__struct_fields__]
    yield f"{indent}{name:{width}}{type(first).__name__}{': ' if told else ''}{', '.join(told)}"


def _moved(first: object, last: object) -> str:
    return _value(first) if first == last else f"{_value(first)} → {_value(last)}"


def _before(progress: float) -> float:
    """The end of a stage that still belongs to it."""
    return progress if progress >= 1 else progress - 1e-9
