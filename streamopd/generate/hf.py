"""The engine that always works: any transformers causal language model with full attention, on one device.

Every token of an answer comes from one decode step, the first one too: a request joins with the cache of its prompt
but the last id, which is fed with everybody else's next id. So a join is a fill, and so is a recompute after a swap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamopd.schemas import Finish, Weights

from .behave import given_logp, kernel_of
from .coauthor import Coauthor
from .coming import Coming, Loader
from .decoder import Decoder
from .engine import Answer, Request, Swapped, error_answer
from .kernel import sample, top_k
from .ledger import Ledger
from .model import open_model, positions, unreadable, vocab_size

JOIN_FRACTION = 0.25     # of the slots empty before others join: a fill costs a forward of its own
COMPACT_FRACTION = 0.8   # of the rows alive, at most, before they close up; who waits would rather fill the gaps

Written = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]  # ids, log-probs, which are the teacher's; [B]


class HFEngine:
    """An Engine over the model in `folder`; `loader` is how published weights get into it (None: it keeps what it has).

    `temperature` may be set anew while nothing is in flight; it is the student's and the teacher's, `top_p` cuts the student's
    kernel only. `pad_id` fills short rows and is never attended to.
    `student_k` of the model's own ids are recorded a token (0: none), always at temperature 1 without top-p.
    `kv` says what a swap does to caches: "keep" leaves old keys and values, "recompute" makes them anew.
    `teacher` is the folder of a model that writes along, for requests whose behaviour needs one (None: there is none).
    UserError when a layer of the model keeps anything but full keys and values.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stop_ids: Sequence[int],
        max_inflight: int,
        pad_id: int = 0,
        loader: Loader | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        student_k: int = 0,
        kv: Literal["keep", "recompute"] = "keep",
        dtype: str = "float32",
        device: str = "",
        teacher: Path | None = None,
        teacher_dtype: str = "float32",
    ) -> None:
        self.version = -1
        self.temperature = temperature
        self.model = open_model(folder, dtype, device)
        self._slots = max_inflight
        self._coming = Coming(loader, self.model.dtype) if loader else None
        self._top_p = top_p
        self._pad_id = pad_id
        self._positions = positions(self.model)
        self._k = min(student_k, vocab_size(self.model))
        self._kv = kv
        self._is_stop = np.zeros(vocab_size(self.model), bool)
        self._is_stop[[stop for stop in stop_ids if stop < len(self._is_stop)]] = True
        self._waiting: deque[Request] = deque()
        self._refused: list[Answer] = []
        self._coauthor: Coauthor | None = None
        if teacher is not None:
            beside = open_model(teacher, teacher_dtype, device, "teacher")
            self._coauthor = Coauthor(beside, max_inflight, pad_id, len(self._is_stop))
        self._empty()

    @property
    def inflight(self) -> int:
        return self._ledger.inflight + len(self._waiting) + len(self._refused)

    @property
    def inflight_tokens(self) -> int:
        return sum(request.tokens for request in (*self._waiting, *filter(None, self._ledger.requests)))

    @property
    def free(self) -> int:
        return max(0, self._slots - self.inflight)

    def admit(self, requests: Sequence[Request]) -> None:
        assert len(requests) <= self.free, f"{len(requests)} requests for {self.free} free slots"
        for request in requests:
            if error := self._unservable(request):
                self._refused.append(error_answer(request, error, *self._kernel(request)))
            else:
                self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        answers, self._refused = self._refused, []
        self._seat_or_compact()
        rows = self._ledger.rows
        if rows:
            answers += self._collect(*self._decode(rows))
        return answers

    def prepare(self, manifest: Weights, weights_dir: Path) -> None:
        assert self._coming is not None, "this engine was opened without a way to swap"
        self._coming.prepare(manifest, weights_dir)

    def swap_in(self, manifest: Weights, weights_dir: Path) -> Swapped:
        assert self._coming is not None, "this engine was opened without a way to swap"
        started = time.perf_counter()
        with self._coming.take(manifest, weights_dir) as fresh:
            self._coming.loader.load(self.model, manifest, fresh)
        loaded = time.perf_counter()
        self.version = manifest.n
        self._ledger.turn(manifest.n, self._kv)
        if self._kv == "recompute":
            self._fill(np.flatnonzero(self._ledger.live).tolist())
        done = time.perf_counter()
        return Swapped(
            version=manifest.n, inflight=self._ledger.inflight, pause_s=done - started, recompute_s=done - loaded
        )

    @torch.inference_mode()
    def probe(self, ids: list[int]) -> NDArray[np.float32]:
        """The first half step by step from an empty cache, the second after a fill: both ways of the decode path."""
        half = max(1, len(ids) // 2)
        return np.concatenate([self._walk(ids[: half + 1], 0), self._walk(ids, half)])

    def abort(self) -> list[Request]:
        dropped = [answer.request for answer in self._refused] + list(self._waiting)
        dropped += [request for request in self._ledger.requests if request is not None]
        self._refused.clear()
        self._waiting.clear()
        self._empty()
        return dropped

    def sleep(self) -> None:
        """Nothing is given back."""

    def wake(self) -> None:
        """Nothing was given back."""

    def _empty(self) -> None:
        self._ledger = Ledger(self._slots, self._k, self._pad_id)
        self._decoder = Decoder(self.model, self._slots, self._pad_id)
        if self._coauthor:
            self._coauthor.empty()

    def _kernel(self, request: Request) -> tuple[float, float]:
        return kernel_of(request.behaviour, self.temperature, self._top_p)

    def _unservable(self, request: Request) -> str:
        error = unreadable(request.prompt_ids, request.max_new, len(self._is_stop), self._positions, given=request.gold_ids)
        if error or request.behaviour.author != "teacher":
            return error
        assert self._coauthor is not None, f"{request.behaviour} needs a teacher, and this engine was opened without one"
        return self._coauthor.unservable(request)

    def _seat_or_compact(self) -> None:
        live = self._ledger.inflight
        empty = self._slots - live
        if self._waiting and (live == 0 or empty >= JOIN_FRACTION * self._slots):
            joining = [self._waiting.popleft() for _ in range(min(empty, len(self._waiting)))]
            self._decoder.make_room(max(request.tokens for request in joining))
            slots = self._ledger.seat(joining, self.version)
            self._fill(slots)
            if self._coauthor:
                self._coauthor.seat(slots, joining)
        elif not self._waiting and 0 < live <= COMPACT_FRACTION * self._ledger.rows:
            sources, targets = self._ledger.gaps()
            self._decoder.move(sources, targets, int(self._ledger.lengths.max()))
            self._ledger.move(sources, targets)
            if self._coauthor:
                self._coauthor.move(sources, targets)

    def _fill(self, slots: list[int]) -> None:
        self._decoder.fill(self._ledger.fed(slots))

    def _decode(self, rows: int) -> Written:
        ids_B = self._ledger.next_ids(rows)
        logits_BV = self._decoder.advance(ids_B, self._ledger.lengths[:rows])
        if self._k:
            ids_BK, logp_BK = top_k(logits_BV, self._k)
            self._ledger.write_topk(ids_BK.cpu().numpy(), logp_BK.cpu().numpy())
        ids_B, logp_B, by_teacher_B = self._draw(ids_B, logits_BV)
        if given := self._ledger.dictated(rows):
            taken, ids = list(given), torch.tensor(list(given.values()), device=logits_BV.device)
            ids_B[taken], logp_B[taken] = ids.cpu(), given_logp(logits_BV[taken], ids, self.temperature).cpu()
        return ids_B, logp_B, by_teacher_B

    def _draw(self, ids_B: NDArray[np.int64], logits_BV: Tensor) -> Written:
        """The next token of every row; `ids_B` was fed, `logits_BV` is what the student said."""
        rows = len(ids_B)
        uniform_B = torch.from_numpy(self._ledger.draws(rows)).to(logits_BV.device)
        if self._coauthor and any(seats := self._coauthor.at_work(self._ledger.written(rows))):
            kernel = self.temperature, self._top_p
            drawn = self._coauthor.write(seats, ids_B, self._ledger.written(rows), logits_BV, uniform_B, *kernel)
            return drawn.ids_B.cpu().numpy(), drawn.logp_B.cpu().numpy(), drawn.by_teacher_B.cpu().numpy()
        drawn_B, logp_B = sample(logits_BV, uniform_B, self.temperature, self._top_p)
        return drawn_B.cpu().numpy(), logp_B.cpu().numpy(), None

    def _collect(
        self, ids_B: NDArray[np.int64], logp_B: NDArray[np.float32], by_teacher_B: NDArray[np.bool_] | None
    ) -> list[Answer]:
        rows = len(ids_B)
        self._ledger.write(ids_B, logp_B, by_teacher_B)
        live_B, stopped_B, broken_B = self._ledger.live[:rows], self._is_stop[ids_B], ~np.isfinite(logp_B)
        done_B = live_B & (stopped_B | broken_B | self._ledger.full(rows))
        return [
            self._break_off(slot) if broken_B[slot] else self._finish(slot, bool(stopped_B[slot]))
            for slot in np.flatnonzero(done_B).tolist()
        ]

    def _finish(self, slot: int, stopped: bool) -> Answer:
        finish = Finish.STOP if stopped else Finish.LENGTH
        fields = self._ledger.read(slot, self._ledger.length(slot))
        request = self._leave(slot)
        temperature, top_p = self._kernel(request)
        return Answer(request=request, finish=finish, temperature=temperature, top_p=top_p, **fields)

    def _break_off(self, slot: int) -> Answer:
        fields = self._ledger.read(slot, self._ledger.length(slot) - 1)  # the last token was drawn from nonsense
        self._decoder.clear(slot)
        request = self._leave(slot, broken=True)
        beside = ", or the teacher's beside it," if request.behaviour.author == "teacher" else ""
        error = f"The model's logits under weights {self.version}{beside} are not finite."
        return error_answer(request, error, *self._kernel(request), **fields)

    def _leave(self, slot: int, broken: bool = False) -> Request:
        if self._coauthor:
            self._coauthor.leave(slot, broken)
        return self._ledger.leave(slot)

    def _walk(self, ids: list[int], filled: int) -> NDArray[np.float32]:
        """Log-probs of ids[filled + 1:], step by step after a fill of the first `filled`."""
        decoder = Decoder(self.model, 1, self._pad_id)
        decoder.make_room(len(ids))
        decoder.fill({0: np.asarray(ids[:filled], np.int64)})
        logp = [
            decoder.advance(np.asarray([ids[at]]), np.asarray([at])).log_softmax(-1)[0, ids[at + 1]].item()
            for at in range(filled, len(ids) - 1)
        ]
        return np.asarray(logp, np.float32)
