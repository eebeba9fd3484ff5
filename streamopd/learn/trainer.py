"""One step: a batch, its divergence from the teacher, and new weights. Deterministic: the same batch gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from streamopd.slots import FullVocabulary, Method

from .collate import MicroBatch, collate
from .freshness import age_weights
from .monitors import Tokens, describe_answers, describe_rows
from .objective import Target, Verdict, judge, overlap
from .rows import Row, Sorted, sort_out
from .schedule import Schedule, lr_at
from .student import Adapter, Student

STATE_FILE = "trainer.safetensors"
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
    ) -> None:
        torch.manual_seed(seed)  # adapters begin at random
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = Student(folder, dtype, adapter, device)
        self.method = method
        self.schedule, self.adam = schedule, adam
        self.stop_ids, self.pad_id, self.max_age = tuple(stop_ids), pad_id, max_age
        self.micro_batch_tokens, self.head_chunk = micro_batch_tokens, head_chunk
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
        cuts.append(perf_counter())
        seconds = dict(zip(("sort", "learn", "update"), np.diff([began, *cuts]).tolist(), strict=False))
        return _report(found, metrics, seconds)

    def _learn(self, n: int, rows: Sequence[Row]) -> dict[str, float]:
        """Gradients of the mean over all fresh tokens of the step; however they are cut, the sum is the same."""
        self.optimizer.zero_grad(set_to_none=True)
        weights = _step_weights(rows, self.method)
        total = sum(len(part) for part in weights)
        loss, seen, overlaps, order = 0.0, [], [], []
        for indices in cut_micro_batches([row.length for row in rows], self.micro_batch_tokens):
            micro = collate(rows, indices, weights, self.pad_id)
            self._refuse_foreign_ids(micro, [rows[i] for i in indices])
            part, columns, shared = self._backward(micro, total, stride=max(1, total // OVERLAP_TOKENS))
            self.moved()
            if not np.isfinite(part):
                raise StreamopdError(self._blame(n, [rows[i] for i in indices], "loss"))
            loss += part
            seen.append(columns)
            overlaps.append(shared)
            order += [rows[i] for i in indices]
        tokens = Tokens(*(torch.cat(column).numpy() for column in zip(*seen, strict=True)))
        exact = isinstance(self.method.support, FullVocabulary)
        return {"loss": loss, "overlap_ratio": float(torch.cat(overlaps).mean())} | describe_rows(order, tokens, exact)

    def _refuse_foreign_ids(self, micro: MicroBatch, rows: Sequence[Row]) -> None:
        """An index beyond the vocabulary would end the process without a word on a GPU."""
        given = (micro.ids, micro.target.sampled, micro.target.ids)
        highest = max(int(ids.max()) for ids in given if ids is not None and ids.numel())
        if highest >= self.student.vocab_size:
            raise GarbageRecord(
                f"Id {highest} came with one of the groups {[row.seq for row in rows]}, the student knows "
                f"{self.student.vocab_size}. Student and teacher need one tokenizer."
            )

    def _backward(self, micro: MicroBatch, total: int, stride: int) -> tuple[float, list[Tensor], Tensor]:
        """Accumulate one micro-batch's share of the gradient: (its loss, columns of `Tokens`, overlap of every `stride`th).

        The head runs chunk by chunk, each back-propagated at once into a copy of the hidden states: logits of one chunk
        exist at a time, and none is computed twice.
        """
        device = self.student.device
        hidden_MD = self.student.read(micro.ids.to(device)).flatten(0, 1)[micro.where.to(device)]
        states_MD = hidden_MD.detach().requires_grad_()
        loss, columns, overlaps = torch.zeros((), device=device), [], []
        for start in range(0, len(states_MD), self.head_chunk):
            part = slice(start, start + self.head_chunk)
            target = Target(*(None if column is None else column[part].to(device) for column in micro.target))  # type: ignore[arg-type]
            logits_NV = self.student.speak(states_MD[part])
            verdict = judge(logits_NV, target, self.method, self.stop_ids)
            share = (verdict.loss * micro.weights[part].to(device)).sum() / total
            share.backward()
            loss += share.detach()
            columns.append(_columns(verdict, logits_NV, target, micro.temperature[part]))
            overlaps.append(self._overlap(logits_NV, target, stride))
        hidden_MD.backward(states_MD.grad)
        return float(loss), [torch.cat(column).cpu() for column in zip(*columns, strict=True)], torch.cat(overlaps).cpu()

    @torch.no_grad()
    def _overlap(self, logits_NV: Tensor, target: Target, stride: int) -> Tensor:
        few = Target(*(None if column is None else column[::stride] for column in target))  # type: ignore[arg-type]
        return overlap(logits_NV[::stride], few, _overlap_k(self.method, logits_NV.shape[1]))

    def _update(self, n: int, rows: Sequence[Row]) -> dict[str, float]:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            raise StreamopdError(self._blame(n, rows, "gradient"))
        clipped = 0 < self.adam.max_grad_norm < float(norm)
        if clipped:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.adam.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(n, self.schedule)
        self.optimizer.step()
        return {"grad_norm": float(norm), "clip_fraction": float(clipped)}

    def _blame(self, n: int, rows: Sequence[Row], what: str) -> str:
        """Name the answer that breaks the step; each is tried alone, nothing is stepped."""
        guilty = next((row for row in rows if self._breaks(row)), None)
        where = f"rollout {guilty.rollout.id} (seq {guilty.seq})" if guilty else f"no single rollout of its {len(rows)}"
        self.optimizer.zero_grad(set_to_none=True)
        return (
            f"The {what} of batch {n} is not a finite number because of {where}; weights {n} are untouched. "
            "Look at the rollout and its evidence, lower learn.lr, or set student.dtype = \"float32\"."
        )

    def _breaks(self, row: Row) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        loss, _, _ = self._backward(collate([row], np.array([0]), _step_weights([row], self.method), self.pad_id), 1, 1)
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
        """What a checkpoint holds: trained parameters, optimizer moments, RNG. Frozen weights stay in the student's folder."""
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

    def _state(self) -> dict[str, Tensor]:
        state = {f"param/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS if parameter in self.optimizer.state else ():
                state[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return state | {"rng": torch.get_rng_state()}

    def _refuse_other_shapes(self, folder: Path, saved: dict[str, tuple[int, ...]]) -> None:
        mine = {f"param/{name}": tuple(p.shape) for name, p in self.parameters.items()}
        theirs = {name: shape for name, shape in saved.items() if name.startswith("param/")}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{folder} holds another student: {name.removeprefix('param/')} is {theirs.get(name)} there and "
                    f"{mine.get(name)} here. Give student.model and learn.lora as they were, or start a new run folder."
                )


def _step_weights(rows: Sequence[Row], method: Method) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Relative weights of each row's fresh tokens, mean one over all of them."""
    ages = [row.ages[row.fresh] for row in rows]
    together = age_weights(np.concatenate(ages), method.age_weight)
    return np.split(together, np.cumsum([len(part) for part in ages])[:-1])  # type: ignore[return-value]


def _columns(verdict: Verdict, logits_NV: Tensor, target: Target, temperature: Tensor) -> list[Tensor]:
    """`Tokens` of a chunk, without gradient."""
    kernel_logp = verdict.logp
    if bool((temperature != 1).any()):
        hot_NV = logits_NV.detach() / temperature.to(logits_NV.device)[:, None]
        kernel_logp = (hot_NV.gather(1, target.sampled[:, None]) - hot_NV.logsumexp(1, keepdim=True))[:, 0]
    return [
        verdict.kl, verdict.logp, kernel_logp, verdict.entropy, verdict.student_mass, verdict.teacher_mass, verdict.stop_logp
    ]


def _overlap_k(method: Method, vocab_size: int) -> int:
    """16, as the field measures it; on a small vocabulary less, or it would always be near 1."""
    asked = 16 if isinstance(method.support, FullVocabulary) else method.support.teacher_k or 16
    return max(1, min(asked, vocab_size // 4))


def _report(found: Sorted, metrics: dict[str, float], seconds: dict[str, float]) -> Trained:
    ages = np.concatenate([row.ages[row.fresh] for row in found.rows]) if found.rows else np.empty(0, np.int32)
    counted = zip(*np.unique(ages, return_counts=True), strict=True)
    return Trained(
        fates=found.fates, metrics=metrics, age_steps={str(age): int(count) for age, count in counted},
        trained_lengths=found.trained_lengths, dropped_lengths=found.dropped_lengths,
        tokens_trained=len(ages), seconds=seconds,
    )
