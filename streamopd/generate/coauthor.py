"""The teacher that writes with the student: the same slots and tokens in lock-step, keys and values of its own.

Its context may differ from the student's prompt, so a row's places are its own: context first, then what was written. Nothing
here is touched by a swap, for a teacher does not change.

Legend: S slots, B rows at work, N rows under one behaviour, V ids that both models have, Q ids of the teacher's context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from streamopd.slots import Behaviour, Coin, Interleave, SwitchAtSpike, TeacherPrefix

from .behave import Drawn, draw, kernel_of, kl, spikes
from .commission import plain
from .decoder import Decoder
from .draws import REPLACEMENTS, uniforms
from .engine import Request
from .kernel import kernel_logp, sample
from .model import positions, unreadable, vocab_size


class Seat(Struct):
    """A row that the teacher reads along."""

    behaviour: Behaviour
    context: NDArray[np.int64]     # [Q]
    until: int                     # tokens of the answer that need the teacher
    second: NDArray[np.float32]    # [until]  draws beside those of the ledger; [0] where the behaviour has no use for them
    handed: bool                   # whether the teacher alone writes
    past: deque[float]             # KL(p‖q) of the last tokens, in nats, where a switch waits for a spike


class Coauthor:
    """The teacher's side of an engine with `slots` slots, over a frozen `model`."""

    def __init__(self, model: PreTrainedModel, slots: int, pad_id: int, student_vocab: int) -> None:
        self._model, self._slots, self._pad_id = model, slots, pad_id
        self._vocab = vocab_size(model)
        self._common = min(self._vocab, student_vocab)  # a head may be padded wider than the other's: nobody writes those ids
        self.empty()

    def empty(self) -> None:
        """Forget every row."""
        self._seats: list[Seat | None] = [None] * self._slots
        self._decoder = Decoder(self._model, self._slots, self._pad_id)

    def unservable(self, request: Request) -> str:
        """Why the teacher cannot read along; "" when it can."""
        return unreadable(request.context_ids, request.max_new, self._vocab, positions(self._model), "teacher")

    def seat(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Read the contexts of those requests that need the teacher, all but their last id, which is fed at the first step."""
        joining = {slot: _seat(r) for slot, r in zip(slots, requests, strict=True) if r.behaviour.author == "teacher"}
        if joining:
            self._decoder.make_room(max(len(seat.context) + seat.until for seat in joining.values()))
            self._decoder.fill({slot: seat.context[:-1] for slot, seat in joining.items()})
        for slot, seat in joining.items():
            self._seats[slot] = seat

    def leave(self, slot: int, broken: bool = False) -> None:
        """Empty a slot; a broken one may hold values that are not finite."""
        if broken and self._seats[slot] is not None:
            self._decoder.clear(slot)
        self._seats[slot] = None

    def move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Rows `sources` over the empty rows `targets`."""
        columns = max((len(seat.context) + seat.until for seat in self._seats if seat is not None), default=0)
        if columns:
            self._decoder.move(sources, targets, columns)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._seats[target], self._seats[source] = self._seats[source], None

    def at_work(self, written_B: NDArray[np.int64]) -> list[Seat | None]:
        """Who needs the teacher for the next token, by row."""
        seats = zip(self._seats[: len(written_B)], written_B.tolist(), strict=True)
        return [seat if seat is not None and written < seat.until else None for seat, written in seats]

    def write(
        self, seats: Sequence[Seat | None], ids_B: NDArray[np.int64], written_B: NDArray[np.int64], logits_BV: Tensor,
        uniform_B: Tensor, temperature: float, top_p: float,
    ) -> Drawn:
        """A token a row: the student's alone where `seats` has nobody. `ids_B` was fed to the student, `logits_BV` is what it said."""
        teacher_BV = self._advance(seats, ids_B, written_B)
        rows_of: dict[Behaviour | None, list[int]] = {}
        for row, seat in enumerate(seats):
            rows_of.setdefault(None if seat is None else seat.behaviour, []).append(row)
        ids_of_B = torch.empty_like(uniform_B, dtype=torch.long)
        logp_B, by_teacher_B = torch.empty_like(uniform_B), torch.zeros_like(uniform_B, dtype=torch.bool)
        for behaviour, rows in rows_of.items():
            rows_N = torch.tensor(rows, device=uniform_B.device)
            if behaviour is None:
                ids_of_B[rows_N], logp_B[rows_N] = sample(logits_BV[rows_N], uniform_B[rows_N], temperature, top_p)
                continue
            q_NV = kernel_logp(teacher_BV[rows_N], kernel_of(behaviour, temperature, top_p)[0] or 1.0, 1.0)
            p_NV = kernel_logp(logits_BV[rows_N, : self._common], temperature, top_p)
            at_work = [seat for seat in seats if seat is not None and seat.behaviour == behaviour]
            found = _draw(behaviour, at_work, p_NV, q_NV, uniform_B[rows_N], written_B[rows])
            ids_of_B[rows_N], by_teacher_B[rows_N] = found.ids_B, found.by_teacher_B
            logp_B[rows_N] = found.logp_B.masked_fill(q_NV[:, 0].isnan(), torch.nan)  # also where the student alone was drawn from
        return Drawn(ids_of_B, logp_B, by_teacher_B)

    def _advance(self, seats: Sequence[Seat | None], ids_B: NDArray[np.int64], written_B: NDArray[np.int64]) -> Tensor:
        """The teacher's logits for the next token, [B, V]; rows without a seat feed a lonely pad, and nobody reads them."""
        fed, lengths = np.full(len(seats), self._pad_id, np.int64), np.zeros(len(seats), np.int64)
        for row, seat in enumerate(seats):
            if seat is not None:
                fed[row] = ids_B[row] if written_B[row] else seat.context[-1]
                lengths[row] = len(seat.context) - 1 + written_B[row]
        return self._decoder.advance(fed, lengths)[:, : self._common]


def _seat(request: Request) -> Seat:
    behaviour, until = request.behaviour, request.max_new
    window = behaviour.window if isinstance(behaviour, SwitchAtSpike) else 0
    if isinstance(behaviour, TeacherPrefix):
        until = min(until, round(plain(behaviour.tokens)))
    second = uniforms(request.seed, until, REPLACEMENTS) if isinstance(behaviour, Interleave) else np.zeros(0, np.float32)
    return Seat(
        behaviour=behaviour, context=request.context_ids.astype(np.int64), until=until, second=second,
        handed=isinstance(behaviour, TeacherPrefix | Coin), past=deque(maxlen=window),
    )


def _draw(
    behaviour: Behaviour, seats: Sequence[Seat], p_NV: Tensor, q_NV: Tensor, uniform_N: Tensor, written_N: NDArray[np.int64]
) -> Drawn:
    """The next token of rows under one behaviour; a spike hands a row over for the rest of its answer."""
    if isinstance(behaviour, SwitchAtSpike):
        for seat, divergence in zip(seats, kl(p_NV, q_NV).tolist(), strict=True):
            seat.handed = seat.handed or spikes(divergence, seat.past, behaviour.factor, behaviour.window)
            seat.past.append(divergence)
    second = [seat.second[at] if len(seat.second) else 0.0 for seat, at in zip(seats, written_N.tolist(), strict=True)]
    handed_N = torch.tensor([seat.handed for seat in seats], device=uniform_N.device)
    return draw(behaviour, p_NV, q_NV, handed_N, uniform_N, uniform_N.new_tensor(second))

