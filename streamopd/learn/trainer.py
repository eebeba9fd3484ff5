"""One step: a batch, its divergence from the teacher, and new weights. Deterministic: the same batch gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from msgspec import Struct
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamopd.errors import GarbageRecord, StreamopdError, UserError
from streamopd.layout import cut_micro_batches
from streamopd.schemas import Batch, Fate
from streamopd.slots import Method, progress_of

from .collate import MicroBatch, collate, told_by_all
from .course import STAGE, VALUES, Course
from .hearing import hear, load_head
from .known import known_of
from .monitors import Tokens, describe_answers, describe_rows
from .objective import Known, Look, Observed, Verdict, instruct, judge, overlap
from .rows import Row, Sorted, sort_out
from .schedule import Schedule, lr_at
from .student import Adapter, Student

STATE_FILE = "trainer.safetensors"
MAX_LOGITS = 32 << 20  # floats of logits that exist at once; a loss over the whole vocabulary has more such arrays: it gets 3/4 of that
OVERLAP_TOKENS = 256  # of a step are looked at for `overlap_ratio`: sorting whole vocabularies is not free
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW(Struct, frozen=True, kw_only=True):
    """The optimizer's own settings."""

    betas: tuple[float, float]
    weight_decay: float      # of matrices; norms and biases are left alone
    max_grad_norm: float     # 0: gradients are never clipped


class Trained(Struct, frozen=True, kw_only=True):
    """What a step did."""

    fates: list[Fate]                 # one an item of the batch
    metrics: dict[str, float]
    age_steps: dict[str, int]         # age -> trained tokens
    trained_lengths: dict[str, int]   # bin of completion length -> rollouts
    dropped_lengths: dict[str, int]
    tokens_trained: int
    seconds: dict[str, float]         # sort, learn, update: where the time went


class Trainer:
    """The student with its optimizer. `batch.n` is the step; the trainer keeps no clock of its own."""

    def __init__(
        self, folder: Path, method: Method, *, schedule: Schedule, adam: AdamW, adapter: Adapter | None, dtype: str,
        stop_ids: Sequence[int], pad_id: int, max_age: int, micro_batch_tokens: int, head_chunk: int, seed: int,
        teachers: Mapping[str, Path] | None = None,
    ) -> None:
        """`teachers`: folders by id, for views that come as hidden states and are read through the teacher's output head."""
        torch.manual_seed(seed)  # adapters begin at random
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = Student(folder, dtype, adapter, device)
        self.method, self.course = method, Course(method)
        self.schedule, self.adam = schedule, adam
        self.stop_ids, self.pad_id, self.max_age = tuple(stop_ids), pad_id, max_age
        self.micro_batch_tokens = micro_batch_tokens
        self.head_chunk = fitting_chunk(head_chunk, self.student.vocab_size, method)
        self.teachers, self._heads = dict(teachers or {}), dict[str, Tensor]()
        self.moved: Callable[[], None] = lambda: None  # called after each micro-batch: a long step is not a hung one
        self.parameters = self.student.trained
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=schedule.lr, betas=adam.betas, fused=True)

    def _parameter_groups(self) -> list[dict[str, object]]:
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.adam.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    # ---------------------------------------------------------------- a step
    def train(self, batch: Batch) -> Trained:
        """Train batch n at step n. When all has expired nothing moves; a loss or gradient that is no number is an error."""
        began = perf_counter()
        found = sort_out(batch, self.max_age)
        metrics = describe_answers(batch) | {"lr": lr_at(batch.n, self.schedule), "tokens": 0.0}
        cuts = [perf_counter()]
        if found.rows:
            metrics |= self._learn(batch.n, found.rows)
            cuts.append(perf_counter())
            metrics |= self._update(batch.n, found.rows)
        if self.method.stages:
            metrics["stage"] = float(self.method.stage_at(self._progress(batch.n), self.course.stage))
        self.course.note(self._progress(batch.n), metrics)
        cuts.append(perf_counter())
        seconds = dict(zip(("sort", "learn", "update"), np.diff([began, *cuts]).tolist(), strict=False))
        return _report(found, metrics, seconds)

    def _learn(self, n: int, rows: Sequence[Row]) -> dict[str, float]:
        """Gradients of the mean over all fresh tokens of the step; however they are cut, the sum is the same."""
        self.optimizer.zero_grad(set_to_none=True)
        method = self._method_at(n)
        known = known_of(rows, n, method)
        orders = self._survey(rows, known, method) if method.surveys else None
        loss, seen, overlaps, order = 0.0, [], [], []
        for chosen, micro in self._micro_batches(rows):
            part, columns, shared = self._backward(micro, known, method, orders)
            self.moved()
            if not np.isfinite(part):
                raise StreamopdError(self._blame(n, chosen, "loss", method))
            loss += part
            seen.append(columns)
            overlaps.append(shared)
            order += chosen
        figures = {"loss": loss} | describe_rows(order, Tokens.joined(seen), self.method.exact)
        return figures | ({"overlap_ratio": float(torch.cat(overlaps).mean())} if overlaps[0] is not None else {})  # type: ignore[arg-type]

    def _method_at(self, n: int) -> Method:
        return self.course.at(self._progress(n))

    def _progress(self, n: int) -> float:
        return progress_of(n, self.schedule.max_steps)

    def _micro_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[Row], MicroBatch]]:
        told = told_by_all(rows)
        for indices in cut_micro_batches([row.length for row in rows], self.micro_batch_tokens):
            micro, chosen = collate(rows, indices, self.pad_id, told), [rows[int(i)] for i in indices]
            self._refuse_foreign_ids(micro, chosen)
            yield chosen, micro

    def _refuse_foreign_ids(self, micro: MicroBatch, rows: Sequence[Row]) -> None:
        """An index beyond the vocabulary would end the process without a word on a GPU."""
        given = [micro.ids, *(ids for view in micro.teachers for ids in (view.target.sampled, view.target.ids))]
        highest = max(int(ids.max()) for ids in given if ids is not None and ids.numel())
        if highest >= self.student.vocab_size:
            raise GarbageRecord(
                f"Id {highest} came with one of the groups {[row.seq for row in rows]}, the student knows "
                f"{self.student.vocab_size}. Student and teacher need one tokenizer."
            )

    @torch.no_grad()
    def _survey(self, rows: Sequence[Row], known: Known, method: Method) -> Tensor:
        """Orders [branches, T] of a step whose tokens must all be seen before one of them can be told anything."""
        facts: dict[str, Tensor] = {}
        for _, micro in self._micro_batches(rows):
            states_MD = self._states(micro)
            for part, look in self._looks(states_MD, micro, known, method):
                for name, column_N in Observed(look, method).items():
                    facts.setdefault(name, torch.zeros(len(known.ids)))[micro.at[part]] = column_N.float().cpu()
            self.moved()
        return instruct(facts, known, method)

    def _backward(
        self, micro: MicroBatch, known: Known, method: Method, orders: Tensor | None
    ) -> tuple[float, Tokens, Tensor | None]:
        """Accumulate one micro-batch's share of the gradient: (its loss, its monitors, overlap of a few tokens).

        The head runs chunk by chunk, each back-propagated at once into a copy of the hidden states: logits of one chunk
        exist at a time, and none is computed twice.
        """
        total, stride = len(known.ids), max(1, len(known.ids) // OVERLAP_TOKENS)
        hidden_MD = self._states(micro)
        states_MD = hidden_MD.detach().requires_grad_()
        loss, columns, overlaps = torch.zeros((), device=hidden_MD.device), [], []
        for part, look in self._looks(states_MD, micro, known, method):
            told = None if orders is None else orders[:, micro.at[part]].to(hidden_MD.device)
            verdict = judge(look, method, told)
            share = (verdict.loss * look.known.weight).sum() / total
            if share.requires_grad:
                share.backward()
            loss += share.detach()
            columns.append(_columns(verdict))
            overlaps += [overlap(look, _overlap_k(method, self.student.vocab_size), stride)] if look.views.teacher is not None else []
        if states_MD.grad is not None:
            hidden_MD.backward(states_MD.grad)
        return float(loss), Tokens.joined(columns), torch.cat(overlaps).cpu() if overlaps else None

    def _states(self, micro: MicroBatch) -> Tensor:
        """Last hidden states [M, D] that predict the tokens that count."""
        device = self.student.device
        return self.student.read(micro.ids.to(device)).flatten(0, 1)[micro.where.to(device)]

    def _looks(self, states_MD: Tensor, micro: MicroBatch, known: Known, method: Method) -> Iterator[tuple[slice, Look]]:
        """The student's logits beside what the teachers say, a chunk of tokens at a time."""
        device = self.student.device
        for start in range(0, len(states_MD), self.head_chunk):
            part = slice(start, start + self.head_chunk)
            views = hear(micro, part, method.teachers, self._head, self.stop_ids, device)
            yield part, Look(self.student.speak(states_MD[part]), views, known.at(micro.at[part]).to(device), self.stop_ids)

    def _head(self, teacher_id: str) -> Tensor:
        if teacher_id not in self._heads:
            if teacher_id not in self.teachers:
                raise UserError(
                    f"Teacher {teacher_id!r} sends hidden states, and the learner has no folder of its model to read them by. "
                    f"Set teachers.{teacher_id}.model, or choose a method that asks for log-probs."
                )
            self._heads[teacher_id] = load_head(self.teachers[teacher_id]).to(self.student.device)
        return self._heads[teacher_id]

    def _update(self, n: int, rows: Sequence[Row]) -> dict[str, float]:
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        if not bool(torch.isfinite(norm)):
            raise StreamopdError(self._blame(n, rows, "gradient", self._method_at(n)))
        clipped = 0 < self.adam.max_grad_norm < float(norm)
        if clipped:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.adam.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(n, self.schedule)
        self.optimizer.step()
        return {"grad_norm": float(norm), "clip_fraction": float(clipped)}

    def _blame(self, n: int, rows: Sequence[Row], what: str, method: Method) -> str:
        """Name the answer that breaks the step; each is tried alone, nothing is stepped."""
        guilty = next((row for row in rows if self._breaks(n, row, method)), None)
        where = f"rollout {guilty.rollout.id} (seq {guilty.seq})" if guilty else f"no single rollout of its {len(rows)}"
        self.optimizer.zero_grad(set_to_none=True)
        return (
            f"The {what} of batch {n} is not a finite number because of {where}; weights {n} are untouched. "
            "Look at the rollout and its evidence, lower learn.lr, or set student.dtype = \"float32\"."
        )

    def _breaks(self, n: int, row: Row, method: Method) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        known = known_of([row], n, method)
        orders = self._survey([row], known, method) if method.surveys else None
        loss, _, _ = self._backward(collate([row], np.array([0]), self.pad_id, told_by_all([row])), known, method, orders)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return not (np.isfinite(loss) and bool(torch.isfinite(torch.nn.utils.get_total_norm(grads))))

    # ---------------------------------------------------------------- weights and state
    def tensors(self) -> dict[str, Tensor]:
        """The whole student by HF names; see `Student.tensors`."""
        return self.student.tensors()

    def published(self) -> dict[str, Tensor]:
        """What travels to the generators: the adapters where there are any, or the whole student."""
        return self.student.adapters() if self.student.adapted else self.student.tensors()

    def save_hf(self, folder: Path, n: int, run: str) -> None:
        """The student after `n` steps of `run` as an HF folder, whole or not at all; see `Student.save_hf`."""
        self.student.save_hf(folder, n, run)

    @property
    def nbytes(self) -> int:
        """Size of the saved state, before it is saved."""
        return 3 * sum(p.nbytes for p in self.parameters.values()) + (1 << 16)

    def save(self, folder: Path) -> None:
        """What a checkpoint holds: trained parameters, optimizer moments, RNG, the course. Frozen weights stay in the student's folder."""
        save_file(self._state(), folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Take up a saved state; UserError when it is of another model."""
        with safe_open(folder / STATE_FILE, "pt") as file:
            names = set(file.keys())
            self._refuse_other_shapes(folder, {name: tuple(file.get_slice(name).get_shape()) for name in names})
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"param/{name}"))
            for name, parameter in self.parameters.items():
                if f"step/{name}" in names:
                    moments = {m: file.get_tensor(f"{m}/{name}").clone().to(parameter.device) for m in MOMENTS}
                    self.optimizer.state[parameter] = moments
            torch.set_rng_state(file.get_tensor("rng").clone())
            if STAGE in names:
                self.course.load({name: file.get_tensor(name) for name in (STAGE, VALUES)})

    def _state(self) -> dict[str, Tensor]:
        state = {f"param/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS if parameter in self.optimizer.state else ():
                state[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return state | {"rng": torch.get_rng_state()} | self.course.state()

    def _refuse_other_shapes(self, folder: Path, saved: dict[str, tuple[int, ...]]) -> None:
        mine = {f"param/{name}": tuple(p.shape) for name, p in self.parameters.items()}
        theirs = {name: shape for name, shape in saved.items() if name.startswith("param/")}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{folder} holds another student: {name.removeprefix('param/')} is {theirs.get(name)} there and "
                    f"{mine.get(name)} here. Give student.model and learn.lora as they were, or start a new run folder."
                )


def fitting_chunk(most: int, vocab_size: int, method: Method) -> int:
    """Tokens whose logits exist at once: `most`, or as many as fit."""
    logits = MAX_LOGITS * 3 // 4 if method.exact else MAX_LOGITS
    return max(1, min(most, logits // vocab_size))


def _columns(verdict: Verdict) -> Tokens:
    """Monitors of a chunk, without gradient."""
    return Tokens(*(None if column is None else column.detach().cpu().numpy() for column in verdict[1:]))  # type: ignore[arg-type]


def _overlap_k(method: Method, vocab_size: int) -> int:
    """16, as the field measures it; on a small vocabulary less, or it would always be near 1."""
    asked = method.evidence.teacher_k or 16
    return max(1, min(asked, vocab_size // 4))


def _report(found: Sorted, metrics: dict[str, float], seconds: dict[str, float]) -> Trained:
    ages = np.concatenate([row.ages[row.fresh] for row in found.rows]) if found.rows else np.empty(0, np.int32)
    counted = zip(*np.unique(ages, return_counts=True), strict=True)
    return Trained(
        fates=found.fates, metrics=metrics, age_steps={str(age): int(count) for age, count in counted},
        trained_lengths=found.trained_lengths, dropped_lengths=found.dropped_lengths,
        tokens_trained=len(ages), seconds=seconds,
    )
