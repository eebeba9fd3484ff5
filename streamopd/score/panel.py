"""Who is asked about an answer, and as what: the teachers that a method listens to, and the reference that it measures from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from streamopd.config import Teacher
from streamopd.errors import ConfigError
from streamopd.schemas import Evidence, Group
from streamopd.score.answer import no_hidden
from streamopd.score.item import Views, as_reference
from streamopd.slots import OWN_START, EvidenceRequest, Method, Pool


class Panel(Struct, frozen=True, kw_only=True):
    """The teachers of a run, for one method."""

    method: str
    evidence: EvidenceRequest
    teachers: tuple[str, ...]        # of role "teacher", ascending; () when the method asks nobody
    outside: frozenset[str]          # of all, those that are servers
    references: tuple[str, ...]      # of role "reference", needed or not
    reference: str = ""              # the one that is asked; "": the method needs none
    pooled: bool = False             # every teacher scores every answer, not only the one that its prompt names
    notes: tuple[str, ...] = ()      # who is configured and not asked, for people

    @classmethod
    def of(cls, method: Method, teachers: Mapping[str, Teacher]) -> Panel:
        """ConfigError, all reasons at once, when these teachers cannot give what the method asks."""
        references = tuple(sorted(name for name, teacher in teachers.items() if _is_reference(teacher)))
        needs_reference = method.needs_teacher and method.needs_reference
        panel = cls(
            method=method.name, evidence=method.evidence,
            teachers=tuple(sorted(teachers.keys() - set(references))) if method.needs_teacher else (),
            outside=frozenset(name for name, teacher in teachers.items() if teacher.urls), references=references,
            reference=(*references, OWN_START)[0] if needs_reference else "",
            pooled=isinstance(method.teachers, Pool), notes=tuple(_notes(method, teachers, references)),
        )
        wrong = [sentence for holds, sentence in _rules(panel, method, teachers) if not holds]
        if wrong:
            raise ConfigError("\n".join(wrong))
        return panel

    @property
    def members(self) -> tuple[str, ...]:
        """All that are asked about anything, in the order of views: teachers by their ids, the reference last."""
        return (*self.teachers, *([self.reference] if self.reference else []))

    @property
    def own_start(self) -> bool:
        """Whether the student's own initial weights are the reference."""
        return bool(self.reference) and self.reference not in self.references

    def role(self, teacher_id: str) -> str:
        return "reference" if teacher_id == self.reference else "teacher"

    def request(self, teacher_id: str) -> EvidenceRequest:
        """What that member is asked."""
        return as_reference(self.evidence) if teacher_id == self.reference else self.evidence

    def width(self, student_k: int, stop_ids: int) -> int:
        """Ids that may come with a token when the reference is asked."""
        asked = self.evidence
        return asked.teacher_k + student_k + asked.sampled + stop_ids * asked.stop + len(asked.slice_ids)

    def asked(self, named: str) -> list[str]:
        """Members that score a prompt naming `named`, as they are asked: servers first, as work is lost when one is away; the
        reference last, as its ids are a teacher's."""
        teachers = self.teachers if self.pooled or not self.teachers else (named,)
        last = [self.reference] if self.reference else []
        return [*sorted(teachers, key=lambda name: (name not in self.outside, name)), *last]

    def together(self, groups: Sequence[Group], said: Mapping[str, Sequence[Views]]) -> list[Views]:
        """Views by group and rollout: one a member that was asked, in the order of `members`."""
        parts = [said[name] for name in self.members if name in said]
        return [
            [_alike([view for part in parts for view in part[g][r]]) for r in range(len(group.rollouts))]
            for g, group in enumerate(groups)
        ]

    # ---------------------------------------------------------------- prompts
    def problem(self, named: str) -> str:
        """Why a prompt cannot name `named`; "" when it can. A pool listens to all, whoever is named."""
        if named in self.references:
            return f'teachers.{named} is of role "reference" and teaches nobody; the prompt names it as its teacher. Name another one.'
        if self.teachers and not self.pooled and named not in self.teachers:
            return f"no teacher is called {named!r}; there are: {', '.join(self.teachers)}"
        return ""

    def refuse_named(self, names: Iterable[str]) -> None:
        """ConfigError when the data names a teacher that it cannot."""
        wrong = [problem for problem in map(self.problem, sorted(names)) if problem]
        if wrong:
            raise ConfigError("\n".join(f"In the data: {problem}" for problem in wrong))


def _is_reference(teacher: Teacher) -> bool:
    return teacher.role == "reference"


def _alike(views: list[Evidence]) -> list[Evidence]:
    """Stop ids are one cell on all sides or on none: what one view cannot tell, none of a rollout's tells."""
    if all(view.stop_logmass is not None for view in views):
        return views
    return [msgspec.structs.replace(view, stop_logmass=None) for view in views]


def _notes(method: Method, teachers: Mapping[str, Teacher], references: Sequence[str]) -> Iterable[str]:
    if not method.needs_teacher:
        yield f'method = "{method.name}" asks no teacher: {", ".join(sorted(teachers)) or "none"} of the run file scores nothing.'
    elif references and not method.needs_reference:
        yield f'method = "{method.name}" needs no reference: teachers.{references[0]} is not asked.'


def _rules(panel: Panel, method: Method, teachers: Mapping[str, Teacher]) -> list[tuple[bool, str]]:
    if not panel.members:
        return []
    rules = [(
        not (panel.own_start and OWN_START in teachers),
        f'method = "{method.name}" needs a reference, which is the student\'s initial weights by the id "{OWN_START}" when no teacher is '
        f'of role "reference"; teachers.{OWN_START} is of role "teacher". Set its role to "reference", or rename it.',
    )]
    if panel.evidence.hidden:
        rules += [(name not in panel.outside, no_hidden(f"teachers.{name}")) for name in panel.members]
    return rules + (_pool_rules(panel, method, method.teachers, teachers) if isinstance(method.teachers, Pool) else [])


def _pool_rules(panel: Panel, method: Method, pool: Pool, teachers: Mapping[str, Teacher]) -> list[tuple[bool, str]]:
    wish, weighed = f'method = "{panel.method}"', [name for name, _ in pool.weights]
    there = f"there {'is' if len(panel.teachers) == 1 else 'are'}: {', '.join(panel.teachers)}"
    return [
        (
            panel.evidence.full or panel.evidence.hidden or "teacher_entropy" not in method.facts,
            f"{wish} looks at the teacher's entropy, and a pool over ids has none that anybody knows. Use FullVocabulary, or leave it out.",
        ),
        *((name in panel.teachers, f"{wish} weighs a teacher {name!r} in its pool; {there}. Rename one of the two.") for name in weighed),
        *((
            not weighed or name in weighed,
            f"{wish} weighs {', '.join(weighed)} in its pool and not {name!r}; {there}. Give it a weight, or take it out of the run file.",
        ) for name in panel.teachers),
        *((
            not teachers[name].teacher_prompt,
            f"{wish} asks all teachers about the student's own prompt, and teachers.{name}.teacher_prompt is set. Leave it out, or choose "
            "a method that asks the one teacher that a prompt names.",
        ) for name in panel.teachers),
    ]
