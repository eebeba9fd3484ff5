"""What a teacher outside the run can do, found out before the first step: nothing that can be measured is believed.

Every check is one function and gives one sentence; it raises TeacherError with both values and what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamopd.assets.vocabulary import texts, tokens, vocab_size
from streamopd.errors import GarbageRecord, TeacherAway, TeacherError, TeacherRefuses
from streamopd.schemas import Array, Evidence, Group, Prompt, Rollout, Span, TopK
from streamopd.schemas.teaching import CONTRACT_VERSION, PackedItem, ScoreItem, TeacherInfo
from streamopd.score.answer import possible_of
from streamopd.score.check import check_evidence
from streamopd.score.http import HttpTeacher, Mark
from streamopd.slots import EvidenceRequest

CALLS = 8            # of the same item
LENGTH = 12          # tokens of a probe completion
PLANTED = (3, 6, 9)  # where one of them is changed
MOVED_NATS = 0.05    # less than this is arithmetic (bfloat16 servers differ by about 0.01), planted signals are nats
MOVED_MASS = 0.02    # of a distribution: half the sum of |differences|
MOST_MOVED_MASS = 0.25
NOISY_NATS = 0.5     # between the same call twice: more than most of what is to be learned
APART_NATS = 0.25    # between two replicas of one teacher
BATCH = 8            # items in the timed call
WAIT_S = 60.0        # for a server that is still starting
COMPARED = 1 << 14   # ids of a vocabulary, at most, where a server is asked about them in prompts
CAP = {"streamopd": "max_topk", "vllm": "--max-logprobs", "completions": "vLLM: --max-logprobs", "sglang": "none is known"}
SCORES = EvidenceRequest(full=False, teacher_k=0, student_ids=False, sampled=True, stop=False)  # and nothing they could contradict


class Student(Struct, frozen=True):
    """What the run will ask: whose ids, how long, and which questions."""

    tokens: Mapping[int, str]
    folder: Path
    vocab_size: int                       # of its head
    stop_ids: tuple[int, ...]
    student_k: int                        # ids that come with each token: its own top ones, or those beside a reference
    max_completion_length: int
    contexts: Sequence[NDArray[np.int32]]  # as this teacher will see them; the longest there is among them


def student_of(
    folder: Path, stop_ids: Sequence[int], student_k: int, max_completion_length: int, contexts: Sequence[NDArray[np.int32]]
) -> Student:
    """The student in an HF folder, as a probe must know it."""
    table = tokens(folder)
    return Student(
        tokens=table, folder=folder, vocab_size=vocab_size(folder) or max(table) + 1, stop_ids=tuple(stop_ids), student_k=student_k,
        max_completion_length=max_completion_length, contexts=contexts,
    )


class Scene:
    """One probe: a teacher, the student it is for, and what the method will ask."""

    def __init__(
        self, teacher: HttpTeacher, student: Student, request: EvidenceRequest, wait_s: float, begun: bool, role: str
    ) -> None:
        self.teacher, self.student, self.request, self.wait_s, self.begun, self.role = teacher, student, request, wait_s, begun, role
        self.here = list(teacher.replicas)  # those that answered

    @property
    def name(self) -> str:
        return f"Teacher {self.teacher.teacher_id!r}"

    @cached_property
    def natural(self) -> NDArray[np.int32]:
        """What the teacher itself would write, as far as it does not end: the completion that changes are planted in."""
        ids = self.completion(LENGTH)
        for g in range(LENGTH if self.tells_own_ids else 0):
            row = _row(self.view(ids[: g + 1], self.favourites).support, g)
            likely = [i for i in row if i in self.student.tokens and i not in self.student.stop_ids]
            ids[g] = max(likely, key=lambda i: row[i], default=ids[g])
        return ids

    @property
    def tells_own_ids(self) -> bool:
        return self.teacher.info is None or self.teacher.info.max_topk >= 0

    @property
    def favourites(self) -> EvidenceRequest:
        """Its own two most likely ids, and nothing that they could contradict."""
        cap = self.teacher.info.max_topk if self.teacher.info else 0
        return EvidenceRequest(full=False, teacher_k=min(2, cap or 2), student_ids=False, sampled=False, stop=False)

    @cached_property
    def same(self) -> list[Evidence]:
        """What it says when it is asked the same CALLS times."""
        return [self.view(self.natural, SCORES) for _ in range(CALLS)]

    @cached_property
    def spread(self) -> float:
        """Nats between the highest and the lowest that the same call gave for one token."""
        return float(np.ptp(np.stack([view.logprobs.numpy() for view in self.same]), axis=0).max())

    @property
    def mark(self) -> Mark:
        """By which it is known again."""
        item: PackedItem = ScoreItem(
            context_ids=Array.of(self.student.contexts[0], "int32"), completion_ids=Array.of(self.natural, "int32")
        )
        return Mark(item, self.same[0].logprobs.numpy(), self.apart_nats)

    @property
    def apart_nats(self) -> float:
        """How far two replicas of one teacher may be apart."""
        return max(APART_NATS, 4 * self.spread)

    def view(self, completion: NDArray[np.int32], request: EvidenceRequest, teacher: HttpTeacher | None = None) -> Evidence:
        """What is said of one completion behind the first context."""
        return self.views([(self.student.contexts[0], completion)], request, teacher)[0]

    def views(
        self, asked: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], request: EvidenceRequest, teacher: HttpTeacher | None = None
    ) -> list[Evidence]:
        """Asked and checked as a run does."""
        teacher = teacher or self.teacher
        groups = [_group(number, *ids, self.student) for number, ids in enumerate(asked)]
        views = teacher.score(groups, request)
        for group, of_group in zip(groups, views, strict=True):
            check_evidence(group, of_group, teacher.vocab_size)
        return [of_group[0][0] for of_group in views]

    def completion(self, length: int, seed: int = 0) -> NDArray[np.int32]:
        """Random tokens that do not end an answer."""
        ids = [i for i in sorted(self.student.tokens) if i not in self.student.stop_ids]
        return np.random.default_rng(seed).choice(np.array(ids, np.int32), length)


Check = Callable[[Scene], str]


def probe(
    teacher: HttpTeacher, student: Student, request: EvidenceRequest, tell: Callable[[str], None], wait_s: float = WAIT_S,
    begun: bool = False, role: str = "teacher",
) -> None:
    """Tell what was found, one sentence a check; TeacherError with every problem of the first stage that has one.

    A reference (`role`) is asked what `as_reference` makes of a method's request.

    In a run that has `begun`, replicas that are away are not waited for: TeacherAway when all are.
    """
    scene = Scene(teacher, student, request, wait_s, begun, role)
    for stage in STAGES:
        problems = []
        for check in stage:
            try:
                tell(check(scene))
            except (TeacherError, GarbageRecord) as error:
                problems.append(str(error))
            except TeacherAway as error:
                if begun:
                    raise
                problems.append(str(error))
        if problems:
            raise TeacherError("\n".join(dict.fromkeys(problems)))
    teacher.mark = scene.mark


# ---------------------------------------------------------------- what it says of itself
def is_reachable(scene: Scene) -> str:
    """Every replica answers, and all say the same of themselves."""
    teacher, deadline_s = scene.teacher, time.monotonic() + (0.0 if scene.begun else scene.wait_s)
    infos: dict[str, TeacherInfo] = {}
    for replica in teacher.replicas:
        try:
            infos[replica.url] = _met(teacher.apart(replica), deadline_s)
        except TeacherRefuses as error:
            raise TeacherError(f"{error}. Look at teachers.{teacher.teacher_id}.url and key_env.") from None
        except TeacherAway as error:
            if not scene.begun:
                raise TeacherError(f"{error}. Start it, or change teachers.{teacher.teacher_id}.url.") from None
            scene.here.remove(replica)
    if not infos:
        raise TeacherAway(f"no server of teacher {teacher.teacher_id!r} answers: {', '.join(teacher.urls)}")
    (url, teacher.info), *others = infos.items()
    for other, info in others:
        if info != teacher.info:
            raise TeacherError(
                f"{scene.name} has replicas that differ: {url} says {teacher.info}, {other} says {info}. Start them alike."
            )
    return f"reached {', '.join(infos)}: {teacher.info.model}"


def speaks_this_contract(scene: Scene) -> str:
    info = scene.teacher.info
    assert info is not None
    if info.contract != CONTRACT_VERSION:
        raise TeacherError(
            f"{scene.name} speaks contract {info.contract}, this streamopd {CONTRACT_VERSION}. Update the older of the two."
        )
    return f"contract {info.contract}"


def shares_the_vocabulary(scene: Scene) -> str:
    """The two tables themselves, id by id; a head may be padded wider unless whole distributions are compared."""
    student, teacher, size = scene.student, scene.teacher, scene.teacher.vocab_size
    ids = sorted(student.tokens) if teacher.spells else _sample(student)
    mine, told = student.tokens if teacher.spells else texts(student.folder), dict(enumerate(teacher.vocabulary(ids).tokens))
    differing = [i for i in ids if not _same(mine[i], told.get(i), teacher.spells)]
    if differing:
        first = differing[0]
        raise TeacherError(
            f"{scene.name} and the student disagree on {len(differing):,} of {len(ids):,} ids, the first is {first}: "
            f"{told.get(first)!r} against the student's {mine[first]!r}. Name a teacher with the student's tokenizer."
        )
    if size < max(student.tokens) + 1:
        raise TeacherError(
            f"{scene.name} scores {size:,} ids, the student's tokenizer has {max(student.tokens) + 1:,}. "
            "Its vocab_size must cover them all."
        )
    if scene.request.full and size != student.vocab_size:
        raise TeacherError(
            f"{scene.name} scores {size:,} ids, the student {student.vocab_size:,}; this method compares whole distributions. "
            "Use a method over a support of ids (method = \"default\"), or a teacher of the student's width."
        )
    wider = f", its head is {size - student.vocab_size:,} ids wider" if size > student.vocab_size else ""
    if teacher.spells:
        return f"the student's {len(ids):,} ids have the same tokens there{wider}"
    return f"{len(ids):,} of the student's {len(student.tokens):,} ids decode to the same there{wider}"


def gives_enough_ids(scene: Scene) -> str:
    """The cap on its own top ids, and what the method's support becomes where it cannot tell all of it."""
    info, request = scene.teacher.info, scene.request
    assert info is not None
    if info.max_topk and request.full:
        raise TeacherError(
            f"{scene.name} returns at most {max(0, info.max_topk)} log-probs a token; this method asks for the whole vocabulary "
            f"({info.vocab_size:,}). Start it without a cap ({CAP[scene.teacher.api]}), or use a method over a support of ids."
        )
    if 0 < info.max_topk < request.teacher_k:
        raise TeacherError(
            f"{scene.name} returns at most {info.max_topk} log-probs a token; this method asks for {request.teacher_k}. "
            f"Start it with a larger cap ({CAP[scene.teacher.api]}), or use a method with teacher_k = {info.max_topk}."
        )
    given = possible_of(request, info, scene.teacher.teacher_id, scene.role)
    lost = [name for name, wanted, told in (
        ("the student's top ids", request.student_ids, given.student_ids), ("stop ids", request.stop, given.stop),
        (f"its own top {request.teacher_k}", request.teacher_k, given.teacher_k),
    ) if wanted and not told]
    told = f"own ids a token: {'any number' if not info.max_topk else f'up to {info.max_topk}' if info.max_topk > 0 else 'none'}"
    if not lost:
        return told
    if not request.tail:
        raise TeacherError(
            f"{scene.name} cannot score {' and '.join(lost)}, and this method renormalises or drops what a support leaves out: over fewer "
            'ids it would be another loss. Use a method with remainder = "tail", or a teacher that can.'
        )
    kept = "its own top ids and the sampled token" if given.teacher_k else "the sampled token"
    return f"{told}; it cannot score {' and '.join(lost)}: the support is {kept}, the rest is one tail (a looser bound)"


def takes_the_longest(scene: Scene) -> str:
    info, needed = scene.teacher.info, _longest(scene.student)
    assert info is not None
    if needed > info.max_tokens:
        raise TeacherError(
            f"{scene.name} takes at most {info.max_tokens:,} tokens; the longest question with an answer of "
            f"generator.max_completion_length has {needed:,}. Start it with a longer limit, or lower "
            "generator.max_completion_length or data.max_prompt_length."
        )
    return f"length: {needed:,} tokens are needed, {info.max_tokens:,} are taken"


# ---------------------------------------------------------------- what it does
def scores_the_first_token(scene: Scene) -> str:
    """An answer of one token gets one score: many servers have none for what comes first."""
    try:
        scene.view(scene.completion(1), SCORES)
    except GarbageRecord as error:
        raise TeacherError(
            f"{scene.name} does not score an answer of one token as one token: {error}. "
            "Row 0 is the log-prob of the first completion token behind the context."
        ) from None
    return "the first token is scored"


def repeats_itself(scene: Scene) -> str:
    if scene.spread > NOISY_NATS:
        raise TeacherError(
            f"{scene.name} gives other scores for the same call: up to {scene.spread:.3g} nats apart in {CALLS} calls, allowed are "
            f"{NOISY_NATS}. Turn off sampling, dropout or routing noise in it."
        )
    return f"spread over {CALLS} calls: {scene.spread:.2g} nats"


def replicas_agree(scene: Scene) -> str:
    """The same completion, asked of each alone."""
    said = {r.url: scene.view(scene.natural, SCORES, scene.teacher.apart(r)).logprobs.numpy() for r in scene.here}
    (first, one), *others = said.items()
    worst, url = max(((float(np.abs(other - one).max()), url) for url, other in others), default=(0.0, ""))
    if worst > scene.apart_nats:
        raise TeacherError(
            f"{scene.name}: {first} and {url} disagree by up to {worst:.3g} nats on the same tokens, allowed are "
            f"{scene.apart_nats:.2g}. They must serve the same weights."
        )
    return f"replicas: {len(said)}, at most {worst:.2g} nats apart"


def scores_speak_of_their_own_token(scene: Scene) -> str:
    """One token of a completion is changed: its own score must move, and none before."""
    moved = {at: _first_moved(_score_distance(scene.same[0], view), MOVED_NATS + 4 * scene.spread)
             for at, view in _planted(scene, SCORES)}
    shifts = [first - at for at, first in moved.items() if first is not None]
    if not shifts:
        raise TeacherError(
            f"{scene.name} gives the same scores whatever the answer is: changing tokens {', '.join(map(str, PLANTED))} moved "
            f"nothing by {MOVED_NATS} nats. It does not read completion_ids."
        )
    if min(shifts):
        raise TeacherError(_shift_sentence(scene.name, "scores", min(shifts)))
    return f"scores speak of their own token ({len(shifts)} planted changes seen where they were planted)"


def reads_the_context(scene: Scene) -> str:
    """The same completion behind other questions, and behind this one with an id changed here and there."""
    context = scene.student.contexts[0]
    others = [scene.student.contexts[-1], context[::-1].copy()]
    for at in np.unique(np.linspace(0, len(context) - 1, CALLS).astype(int)):
        others.append(context.copy())
        others[-1][at] = next(i for i in sorted(scene.student.tokens) if i != context[at])
    views = scene.views([(other, scene.natural) for other in others], SCORES)
    moved = sum(bool((_score_distance(scene.same[0], view) > MOVED_NATS + 4 * scene.spread).any()) for view in views)
    if not moved:
        raise TeacherError(
            f"{scene.name} gives the same scores whatever the question is: {len(others)} other contexts moved nothing by {MOVED_NATS} "
            "nats. It does not read context_ids."
        )
    return f"context: {moved} of {len(others)} other ones change the scores"


def batches_say_what_items_say(scene: Scene) -> str:
    """Items of several lengths in one request, each against the same item alone: order, padding, positions."""
    first, longest = scene.student.contexts[0], scene.student.contexts[-1]
    items = [(first, scene.natural), (longest, scene.natural[:5]), (first, scene.natural[:1]), (longest, scene.completion(LENGTH, 1)),
             (first, scene.completion(LENGTH, 2))]
    for replica in scene.here:
        alone = scene.teacher.apart(replica)
        for number, (item, together) in enumerate(zip(items, scene.views(items, SCORES, alone), strict=True)):
            apart = float(_score_distance(scene.views([item], SCORES, alone)[0], together).max())
            if apart > scene.apart_nats:
                raise TeacherError(
                    f"{scene.name} at {replica.url} scores item {number} of {len(items)} in one request {apart:.3g} nats away from the "
                    f"same item alone, allowed are {scene.apart_nats:.2g}. Look at the order of its answers, its padding and positions."
                )
    return f"batches: {len(items)} items of several lengths score as they do alone"


def distributions_speak_of_their_own_token(scene: Scene) -> str:
    """One token of a completion is changed: distributions may move from the next row on, and somewhere must."""
    if not (scene.request.full or scene.request.teacher_k):
        return "distributions: the method asks for none"
    if not scene.tells_own_ids:
        return "distributions: it tells none"
    told, limit = scene.view(scene.natural, scene.request), min(MOVED_MASS + 2 * scene.spread, MOST_MOVED_MASS)
    moved = {at: _first_moved(_distribution_distance(told, view), limit) for at, view in _planted(scene, scene.request)}
    shifts = [first - at - 1 for at, first in moved.items() if first is not None]
    if not shifts:
        raise TeacherError(
            f"{scene.name} tells the same distributions whatever was written before: changing tokens {', '.join(map(str, PLANTED))} moved "
            f"nothing by {limit:.2g} of the mass."
        )
    early, late = min(shifts) < 0, len(shifts) > 1 and min(shifts) > 0  # one may happen not to matter to the next row
    if early or late:
        raise TeacherError(_shift_sentence(scene.name, "distributions", min(shifts)))
    return f"distributions speak of their own token ({len(shifts)} planted changes seen behind where they were planted)"


def says_what_a_stop_is_worth(scene: Scene) -> str:
    """The stop mass is at least that of each stop id, where both are told."""
    view = scene.view(scene.natural, scene.request)
    if view.stop_logmass is None:
        return "stop ids: it gives no mass of its own"
    stop_G = view.stop_logmass.numpy()
    for stop in scene.student.stop_ids:
        alone_G = _of_id(view, stop)
        wrong = alone_G > stop_G + MOVED_NATS + 0.01 * np.abs(stop_G)
        if wrong.any():
            at = int(wrong.argmax())
            raise TeacherError(
                f"{scene.name} gives stop id {stop} log-prob {alone_G[at]:.4g} at token {at}, and all stop ids together "
                f"{stop_G[at]:.4g}. stop_logmass is the log of their summed probability."
            )
    return f"stop ids: between {np.exp(stop_G.min()):.2g} and {np.exp(stop_G.max()):.2g} of the mass"


def answers_at_a_rate(scene: Scene) -> str:
    """A batch of the longest items there will be."""
    longest = max(scene.student.contexts, key=len)
    items = [(longest, scene.completion(scene.student.max_completion_length, seed)) for seed in range(BATCH)]
    start_s = time.monotonic()
    scene.views(items, scene.request)
    tokens = sum(len(context) + len(completion) for context, completion in items)
    return f"rate: {tokens / max(time.monotonic() - start_s, 1e-6):,.0f} tokens/s in items of {tokens // BATCH:,}"


STAGES: tuple[tuple[Check, ...], ...] = (
    (is_reachable,),
    (speaks_this_contract,),
    (shares_the_vocabulary, gives_enough_ids, takes_the_longest),
    (scores_the_first_token,),
    (repeats_itself, replicas_agree, scores_speak_of_their_own_token, reads_the_context, batches_say_what_items_say),
    (distributions_speak_of_their_own_token, says_what_a_stop_is_worth, answers_at_a_rate),
)


# ---------------------------------------------------------------- how it is measured
def _sample(student: Student) -> list[int]:
    """Ids to compare where each costs a token of the server's work: those of the questions, and others at even distances."""
    rest = sorted(student.tokens)
    asked = {int(i) for context in student.contexts for i in context} & set(rest)
    return sorted(asked | set(rest[:: -(-len(rest) // COMPARED)]))


def _same(mine: str, theirs: str | None, exact: bool) -> bool:
    """Texts of single ids lose a space at the front in some decoders, and what is no text alone is not comparable."""
    if exact or theirs is None:
        return mine == theirs
    return mine == theirs or mine.strip(" ") == theirs.strip(" ") != "" or "\ufffd" in mine + theirs


def _met(teacher: HttpTeacher, deadline_s: float) -> TeacherInfo:
    """The info of one replica; one that is still starting is waited for."""
    while True:
        teacher.info = None
        try:
            return teacher.meet()
        except TeacherRefuses:
            raise
        except TeacherAway:
            if time.monotonic() > deadline_s:
                raise


def _group(number: int, context: NDArray[np.int32], completion: NDArray[np.int32], student: Student) -> Group:
    """A group of one answer, as a generator hands it on."""
    ids, own = Array.of(context, "int32"), None
    if student.student_k:
        width = min(student.student_k, student.vocab_size)
        own_Gk = [[(int(token) + k) % student.vocab_size for k in range(width)] for token in completion]
        own = TopK(Array.of(own_Gk, "int32"), Array.of(np.full((len(own_Gk), width), -1.0), "float16"))
    prompt = Prompt(id=f"probe{number}", run="probe", method="probe", born_s=0.0, seq=number, prompt_ids=ids)
    rollout = Rollout(
        id=f"probe{number}.0", prompt_ids=ids, completion_ids=Array.of(completion, "int32"), weight_spans=[Span(0, 0)],
        logprobs=Array.of(np.full(len(completion), -1.0), "float32"), student_topk=own,
    )
    return Group(id=prompt.id, run=prompt.run, method=prompt.method, born_s=0.0, prompt=prompt, rollouts=[rollout])


def _longest(student: Student) -> int:
    return max(len(context) for context in student.contexts) + student.max_completion_length


def _planted(scene: Scene, request: EvidenceRequest) -> Iterator[tuple[int, Evidence]]:
    """(where, view) of the natural completion with one token changed to what the teacher would not write, for each of PLANTED."""
    for at in PLANTED:
        changed = scene.natural.copy()
        changed[at] = next(int(i) for i in scene.completion(LENGTH, seed=at) if i != changed[at])
        yield at, scene.view(changed, request)


def _first_moved(distance_G: NDArray[np.float64], limit: float) -> int | None:
    return next((int(i) for i in np.flatnonzero(distance_G > limit)), None)


def _score_distance(one: Evidence, other: Evidence) -> NDArray[np.float64]:
    return np.abs(one.logprobs.numpy().astype(np.float64) - other.logprobs.numpy())


def _distribution_distance(one: Evidence, other: Evidence) -> NDArray[np.float64]:
    """[G] half the sum of |differences| over the ids that both rows tell, zero where nothing is told."""
    if one.support is None or other.support is None:
        return np.zeros(len(one.logprobs))
    return np.array([_mass_between(one.support, other.support, row) for row in range(len(one.logprobs))])


def _mass_between(one: TopK, other: TopK, row: int) -> float:
    mine, theirs = _row(one, row), _row(other, row)
    top = abs(max(mine.values()) - max(theirs.values()))
    return max(top, sum(abs(mine[i] - theirs[i]) for i in mine.keys() & theirs.keys()) / 2)


def _row(support: TopK | None, row: int) -> dict[int, float]:
    """Id -> probability."""
    if support is None:
        return {}
    q = np.exp(support.logprobs.numpy()[row].astype(np.float64)).tolist()
    ids = range(len(q)) if support.ids is None else support.ids.numpy()[row].tolist()
    return {i: q_i for i, q_i in zip(ids, q, strict=True) if i >= 0}


def _of_id(view: Evidence, index: int) -> NDArray[np.float32]:
    """[G] the log-prob of one id, -inf where it is not told."""
    if view.support is None:
        return np.full(len(view.logprobs), -np.inf, np.float32)
    logp: NDArray[np.float32] = view.support.logprobs.numpy().astype(np.float32)
    if view.support.ids is None:
        return logp[:, index]
    return np.where(view.support.ids.numpy() == index, logp, -np.inf).max(1)


def _shift_sentence(name: str, what: str, shift: int) -> str:
    tokens = f"{abs(shift)} token{'s' if abs(shift) > 1 else ''}"
    held = f"row g holds what belongs to token g {'+' if shift < 0 else '-'} {abs(shift)}"
    return (
        f"{name}: its {what} come {tokens} too {'early' if shift < 0 else 'late'}: {held} (a token was changed, and the first row "
        f"to move was {abs(shift)} {'before' if shift < 0 else 'behind'} where it must be). Row g speaks of predicting completion token g."
    )
